"""The router, the smoothing, the straight-through confidence and the ratio loss against numpy, number by number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm.models.chunking import (
    Routing,
    boundary_means,
    ratio_loss,
    route,
    segment_starts,
    smooth,
    smooth_step,
    straight_through,
    unit,
)


def router_twin(q, k, starts, valid):
    p = np.zeros(q.shape[:2])
    for b, t in np.ndindex(p.shape):
        if starts[b, t]:
            p[b, t] = 1
        else:
            before, now = q[b, t - 1], k[b, t]
            size = max(np.linalg.norm(before), 1e-12) * max(np.linalg.norm(now), 1e-12)
            p[b, t] = min(max((1 - before @ now / size) / 2, 0), 1)
    return p, (p > 0.5) & valid


def test_router_equals_numpy_twin(x64):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 3, 9, 4))
    segments = np.array([[1] * 9, [1, 1, 2, 2, 2, 3, 3, 0, 0], [1, 2, 2, 2, 2, 2, 0, 0, 0]])
    starts, valid = segment_starts(jnp.asarray(segments), 3, 9), segments > 0
    np.testing.assert_array_equal(np.flatnonzero(starts[1]), [0, 2, 5, 7])
    got = route(jnp.asarray(q), jnp.asarray(k), starts, jnp.asarray(valid))
    p, boundary = router_twin(q, k, np.asarray(starts), valid)
    np.testing.assert_allclose(got.probability, p, atol=1e-12)
    np.testing.assert_array_equal(got.boundary, boundary)
    np.testing.assert_allclose(got.confidence, np.where(boundary, p, 1 - p), atol=1e-12)


def test_a_tie_is_no_boundary():
    q, k = jnp.array([[[1.0, 0.0], [0.0, 0.0]]]), jnp.array([[[1.0, 0.0], [0.0, 3.0]]])  # at a right angle
    got = route(q, k, segment_starts(None, 1, 2), jnp.ones((1, 2), bool))
    assert got.probability[0, 1] == 0.5 and got.boundary.tolist() == [[True, False]]


def test_zero_vectors_have_a_finite_gradient():
    """Empty slots are zero vectors: they must not poison the gradient of the others."""
    grad = jax.grad(lambda x: jnp.sum(unit(x) * jnp.array([1.0, 2.0])))(jnp.zeros((3, 2)))
    assert jnp.isfinite(grad).all()
    np.testing.assert_allclose(unit(jnp.array([3e-20, 4e-20])), [3e-8, 4e-8], rtol=1e-5)  # as max(|x|, 1e-12) says


@pytest.mark.parametrize("form", ["scan", "blocked"])
def test_smoothing_equals_numpy_twin(x64, form):
    rng = np.random.default_rng(1)
    z, p = rng.standard_normal((2, 11, 3)), rng.random((2, 11))
    p[:, 0], p[0, 4], p[1, 5] = 1, 1, 0
    starts = np.zeros((2, 11), bool)
    starts[:, 0], starts[0, 4] = True, True
    want = np.zeros_like(z)
    for b in range(2):
        value = np.zeros(3)
        for j in range(11):
            weight = min(max(p[b, j], 1e-4), 1 - 1e-4)
            value = weight * z[b, j] + (0 if starts[b, j] else (1 - weight) * value)
            want[b, j] = value
    got = smooth(jnp.asarray(z), jnp.asarray(p), jnp.asarray(starts), form)
    np.testing.assert_allclose(got, want, atol=1e-12)
    np.testing.assert_allclose(got[:, 0], (1 - 1e-4) * z[:, 0])  # 0.9999 at a start, not 1
    value = jnp.zeros((2, 3))
    for j in range(4):
        value = smooth_step(jnp.asarray(z[:, j]), jnp.asarray(p[:, j]), value)
        np.testing.assert_allclose(value, want[:, j], atol=1e-12)
    grad = jax.grad(lambda p: jnp.sum(smooth(jnp.asarray(z), p, jnp.asarray(starts), form)))(jnp.asarray(p))
    assert grad[1, 5] == 0 and grad[0, 4] == 0 and (np.abs(grad[:, 6:]) > 0).all()  # nothing through the clamp


def test_straight_through_is_one_with_a_gradient():
    c = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1, 1000), jnp.float32)
    assert (straight_through(c) == 1).all()
    np.testing.assert_array_equal(jax.grad(lambda c: jnp.sum(straight_through(c) * 3))(c), 3.0)


@pytest.mark.parametrize("n", [2.5, 3.0, 6.0])
def test_ratio_loss(n):
    value = lambda f, g: float(ratio_loss(jnp.asarray(f), jnp.asarray(g), n))  # noqa: E731
    assert value(1 / n, 1 / n) == pytest.approx(1, abs=1e-6)
    assert value(0.3, 0.4) == pytest.approx(n / (n - 1) * ((n - 1) * 0.3 * 0.4 + 0.7 * 0.6), rel=1e-6)
    # dL/dG = N (N F - 1) / (N - 1), and nothing through F
    for f in (0.1, 0.5):
        grads = jax.grad(ratio_loss, argnums=(0, 1))(f, 0.4, n)
        assert grads[0] == 0 and float(grads[1]) == pytest.approx(n * (n * f - 1) / (n - 1), rel=1e-5)


def test_means_count_valid_positions_only():
    valid = jnp.array([[True, True, False], [True, False, False]])
    routing = Routing(jnp.array([[1.0, 0.2, 0.9], [1.0, 0.8, 0.7]]), jnp.array([[True, False, False]] * 2))
    f, g = boundary_means(routing, valid)
    assert float(f) == pytest.approx(2 / 3) and float(g) == pytest.approx(2.2 / 3)
