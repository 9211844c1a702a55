"""The gradient of RMSNorm, which is written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bytelm.nn.layers import RMSNorm


def plain(x, scale, eps, last):
    axes = tuple(range(x.ndim - last, x.ndim))
    return x / jnp.sqrt(jnp.mean(x**2, axes, keepdims=True) + eps) * scale


@pytest.mark.parametrize("shape", [(7,), (3, 5)])
@pytest.mark.parametrize("size,eps", [(1.0, 1e-5), (1e-3, 1e-5), (1e-6, 1e-5), (0.0, 1e-5), (1e3, 1e-8)])
def test_gradients(shape, size, eps, x64):
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(4, *shape))) for _ in range(2))
    x, scale = size * x, jnp.asarray(rng.normal(size=shape))
    norm = RMSNorm(shape, eps=eps, dtype="float64")
    graph, weights = nnx.split(norm)

    def ours(x, scale):
        return nnx.merge(graph, jax.tree.map(lambda _: scale, weights))(x)

    want, back = jax.vjp(lambda x, scale: plain(x, scale, eps, len(shape)), x, scale)
    got, our_back = jax.vjp(ours, x, scale)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    for a, b in zip(our_back(g), back(g)):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12 * float(jnp.abs(b).max()))


def test_the_gradient_stands_at_a_right_angle():
    """In float32: what scales x as a whole gets next to nothing (the worst gradient of an H-Net parity case)."""
    rng = np.random.default_rng(1)
    x, g = (jnp.asarray(rng.normal(size=(256, 64)), jnp.float32) for _ in range(2))
    norm = RMSNorm((64,), eps=1e-12, dtype="float32")
    (dx,) = jax.vjp(norm, x)[1](g)
    along = np.sum(np.asarray(dx, np.float64) * np.asarray(x, np.float64))
    assert abs(along) <= 2e-8 * np.abs(np.asarray(dx) * np.asarray(x)).sum()
