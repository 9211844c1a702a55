"""Boundary predictor and strided convolution."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bytelm.models.pooling import (
    StridedConvolution,
    binomial_nll,
    close_rows,
    draw_boundaries,
    pool_segments,
)


def test_segments_are_means_and_what_stands_behind_is_dropped():
    rng = np.random.default_rng(0)
    h = rng.standard_normal((2, 7, 3)).astype(np.float32)
    cuts = np.array([[0, 1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 1]], np.float32)
    pooled = pool_segments(jnp.asarray(h), jnp.asarray(cuts), 7)
    wanted = [[h[0, :2].mean(0), h[0, 2:5].mean(0)], [h[1, :1].mean(0), h[1, 1:].mean(0)]]
    np.testing.assert_allclose(pooled.states[:, :2], wanted, rtol=1e-5)
    assert np.asarray(pooled.valid).sum(axis=1).tolist() == [2, 2]
    assert np.asarray(pooled.position[:, :2]).tolist() == [[0, 2], [0, 1]]
    assert float(jnp.abs(pooled.states[:, 2:]).max()) == 0


def test_boundaries_get_the_gradient_of_the_membership_matrix():
    """As if slot s held byte t with weight 1 + (boundaries in front of t) - s where that is 1; finite differences."""
    rng = np.random.default_rng(1)
    h, cuts = rng.standard_normal((1, 6, 2)), np.array([[0.0, 1, 0, 1, 0, 1]])
    out = rng.standard_normal((1, 3, 2))

    def twin(boundaries):
        before = np.cumsum(boundaries, axis=1) - boundaries
        fixed = (np.cumsum(cuts, axis=1) - cuts).astype(int)
        total = 0.0
        for s in range(3):
            at = fixed[0] == s
            weight = 1 + before[0, at] - s
            total += ((weight @ h[0, at]) / (weight.sum() + 1e-9)) @ out[0, s]
        return total

    ours = jax.grad(lambda b: (pool_segments(jnp.asarray(h), b, 3).states * out).sum())(jnp.asarray(cuts))
    eps = 1e-5
    for i in range(6):
        step = np.zeros((1, 6))
        step[0, i] = eps
        assert float(ours[0, i]) == pytest.approx((twin(cuts + step) - twin(cuts - step)) / (2 * eps), abs=2e-4)


def test_rows_close_with_a_boundary_and_padding_has_none():
    real = jnp.array([[True] * 4, [True, True, False, False]])
    cuts = close_rows(jnp.array([[1.0, 0, 0, 0], [0, 0, 1, 1]]), real)
    assert np.asarray(cuts).tolist() == [[1, 0, 0, 1], [0, 1, 0, 0]]


def test_drawn_boundaries_follow_their_probability_and_pass_gradients():
    logits = jnp.full((1, 20000), 0.4)
    drawn = draw_boundaries(logits, jax.random.key(0))
    assert float((drawn > 0.5).mean()) == pytest.approx(1 / (1 + math.exp(-0.4)), abs=0.01)
    assert (draw_boundaries(logits, None) == 1).all()
    slope = jax.grad(lambda x: draw_boundaries(x, jax.random.key(0)).sum())(logits)
    assert (slope >= 0).all()
    assert float((slope > 1e-6).mean()) > 0.99


def test_binomial_loss_is_the_formula():
    counts, lengths, prior = np.array([3.0, 9.0]), np.array([10.0, 20.0]), 0.4
    wanted = np.mean(
        [-math.log(math.comb(int(n), int(k)) * prior**k * (1 - prior) ** (n - k)) / n for k, n in zip(counts, lengths)]
    )
    assert float(binomial_nll(jnp.asarray(counts), jnp.asarray(lengths), prior)) == pytest.approx(wanted, rel=1e-5)


def test_convolution_reads_whole_stretches_only():
    pool = StridedConvolution(4, 3, eps=1e-6, dtype="float32", rngs=nnx.Rngs(params=0))
    h = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 4)), jnp.float32)
    real = jnp.arange(8)[None] < 4
    out = pool(h, real)
    assert out.states.shape == (1, 2, 4)
    assert np.asarray(out.valid).tolist() == [[True, True]]
    assert np.asarray(out.position).tolist() == [[0, 3]]
    x = np.asarray(h) / np.sqrt((np.asarray(h) ** 2).mean(-1, keepdims=True) + 1e-6)
    y = np.einsum("sd,sde->e", x[0, 3:6], np.asarray(pool.kernel[...])) + np.asarray(pool.bias[...])
    wanted = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in y]
    np.testing.assert_allclose(out.states[0, 1], wanted, atol=1e-5)
    later = pool(h.at[0, 6:].set(9.0), real)
    np.testing.assert_array_equal(later.states, out.states)
