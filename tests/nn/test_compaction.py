"""Slots: what is kept, in order, dropped by position, and read back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelm.nn.compaction import compact, expand, newest_slot, slot_positions


def twin(keep, x, capacity):
    """Row by row: kept vectors in order, zeros behind; slot read at each position."""
    out = np.zeros((len(x), capacity, x.shape[-1]))
    read = np.zeros(keep.shape, int)
    for row in range(len(x)):
        kept = [x[row, t] for t in range(keep.shape[1]) if keep[row, t]][:capacity]
        for slot, vector in enumerate(kept):
            out[row, slot] = vector
        seen = 0
        for t in range(keep.shape[1]):
            seen += keep[row, t]
            read[row, t] = min(max(seen - 1, 0), capacity - 1)
    return out, read


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 7, 8, 20]), st.floats(0, 1))
def test_equals_numpy_twin(seed, capacity, rate):
    rng = np.random.default_rng(seed)
    keep, x = rng.random((3, 7)) < rate, rng.standard_normal((3, 7, 2)).astype(np.float32)
    want, read = twin(keep, x, capacity)
    at = slot_positions(jnp.asarray(keep), capacity)
    np.testing.assert_array_equal(compact(jnp.asarray(x), at), want.astype(np.float32))
    slots = newest_slot(jnp.asarray(keep), capacity)
    np.testing.assert_array_equal(slots, read)
    full = np.take_along_axis(want, read[..., None], axis=1)
    np.testing.assert_array_equal(expand(jnp.asarray(want), slots), full)
    np.testing.assert_array_equal(at < 7, np.arange(capacity) < np.minimum(keep.sum(1), capacity)[:, None])


def test_integers_and_scalars_move_too():
    keep = jnp.array([[False, True, True, False]])
    at = slot_positions(keep, 3)
    np.testing.assert_array_equal(compact(jnp.array([[5, 6, 7, 8]]), at), [[6, 7, 0]])


@pytest.mark.parametrize("capacity", [2, 4, 9])
def test_gradient_goes_to_kept_positions_only(capacity):
    keep = jnp.array([[True, False, True, True, False, True]])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 3)), jnp.float32)
    weights = jnp.arange(1.0, capacity + 1)[None, :, None]
    grad = jax.grad(lambda x: jnp.sum(compact(x, slot_positions(keep, capacity)) * weights))(x)[0, :, 0]
    want = [w if w <= capacity else 0 for w in (1, 0, 2, 3, 0, 4)]
    np.testing.assert_array_equal(grad, want)
