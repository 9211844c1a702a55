"""Banded attention against the masked full form; the ring cache's bookkeeping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm.nn.attend import attend, banded_attend, blocked_attend, causal_attend, causal_mask, tiled_attend
from bytelm.nn.attention import newest_position


def qkv(t, seed=0, b=2, heads=4, groups=2, width=8):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((b, t, n, width)), jnp.float32) for n in (heads, groups, groups))


@pytest.mark.parametrize("t,window", [(100, 7), (97, 32), (130, 40), (65, 1), (200, 64)])
@pytest.mark.parametrize("packed", [False, True])
def test_banded_equals_masked(t, window, packed):
    q, k, v = qkv(t, seed=t)
    segments = (
        jnp.asarray(np.cumsum(np.random.default_rng(t).random((2, t)) < 0.1, axis=1), jnp.int32) if packed else None
    )
    want = attend(q, k, v, causal_mask(t, window, segments))
    np.testing.assert_allclose(banded_attend(q, k, v, window, segments), want, atol=2e-6)


@pytest.mark.parametrize(
    "form,t,block",
    [(blocked_attend, 150, 16), (blocked_attend, 64, 16), (blocked_attend, 33, 64), (tiled_attend, 100, 32),
     (tiled_attend, 64, 64)],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_parts_of_the_row_equal_masked_with_gradients(form, t, block, packed):
    args = qkv(t, seed=t)
    segments = (
        jnp.asarray(np.cumsum(np.random.default_rng(t).random((2, t)) < 0.1, axis=1), jnp.int32) if packed else None
    )
    want = jax.vjp(lambda *a: attend(*a, causal_mask(t, 0, segments)), *args)
    got = jax.vjp(lambda *a: form(*a, segments, block), *args)
    np.testing.assert_allclose(got[0], want[0], atol=2e-6)
    for g, w in zip(got[1](jnp.cos(want[0])), want[1](jnp.cos(want[0]))):
        np.testing.assert_allclose(g, w, atol=2e-5)


def test_attend_equals_numpy(x64):
    q, k, v = (x.astype(jnp.float64) for x in qkv(9))
    got = causal_attend(q, k, v, None, 0, "xla")
    for i in range(9):
        for h in range(4):
            scores = np.asarray(k[1, : i + 1, h // 2] @ q[1, i, h]) / np.sqrt(8)
            weights = np.exp(scores - scores.max())
            np.testing.assert_allclose(
                got[1, i, h], weights @ np.asarray(v[1, : i + 1, h // 2]) / weights.sum(), atol=1e-12
            )


def test_ring_knows_the_newest_position():
    for slots in (1, 3, 8):
        for last in range(-1, 20):
            held = {p % slots: p for p in range(last + 1)}
            got = np.asarray(newest_position(jnp.array([last]), slots))[0]
            for slot in range(slots):
                assert got[slot] == held[slot] if slot in held else got[slot] < 0
