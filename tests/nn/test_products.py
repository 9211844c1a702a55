"""Matrix products with gradients laid out by hand against einsum's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm.nn.products import contract, head_mix, head_scores

PRODUCTS = [
    ("xyi,io->xyo", (2, 3, 4), (4, 5)),
    ("xijk,ijko->xo", (3, 2, 4, 5), (2, 4, 5, 6)),
    ("xi,ijk->xjk", (3, 4), (4, 2, 5)),
    ("xyd,vd->xyv", (2, 3, 4), (5, 4)),
    ("bhqk,bhsk->bhqs", (2, 3, 4, 5), (2, 3, 6, 5)),
    ("bhqs,bshk->bqhk", (2, 3, 4, 6), (2, 6, 3, 5)),
    ("bqn,bhpn->bqhp", (2, 3, 4), (2, 5, 6, 4)),
    ("bshp,bsn->bhpn", (2, 3, 4, 5), (2, 3, 6)),
    ("i,i->", (4,), (4,)),
]
SINGLE_ROWS = [("xyi,io->xyo", (1, 1, 4), (4, 5)), ("bgqk,bgsk->bgqs", (2, 3, 1, 4), (2, 3, 5, 4)),
               ("bgqs,bgsk->bgqk", (2, 3, 1, 5), (2, 3, 5, 4)), ("i,io->o", (4,), (4, 5))]  # fmt: skip


@pytest.mark.parametrize("spec,a,b", PRODUCTS)
def test_contract_is_einsum_with_its_gradients(spec, a, b, x64):
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=shape)) for shape in (a, b))
    want, back = jax.vjp(lambda a, b: jnp.einsum(spec, a, b), a, b)
    got, ours = jax.vjp(lambda a, b: contract(spec, a, b), a, b)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-12)
    g = jnp.asarray(rng.normal(size=want.shape))
    for x, y in zip(ours(g), back(g)):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, atol=1e-12)


@pytest.mark.parametrize("spec,a,b", PRODUCTS + SINGLE_ROWS)
@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_bfloat16_is_rounded_once(spec, a, b, dtype):
    """Products and gradients are those of the same numbers in float32, rounded at the end."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in (a, b))
    want, back = jax.vjp(lambda a, b: jnp.einsum(spec, a, b), a.astype(jnp.float32), b.astype(jnp.float32))
    got, ours = jax.vjp(lambda a, b: contract(spec, a, b, dtype), a, b)
    assert got.shape == want.shape and got.dtype == (dtype or jnp.bfloat16)
    near = lambda x, y, of: np.testing.assert_allclose(  # noqa: E731
        np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=2.0**-8 if of == jnp.bfloat16 else 0, atol=1e-5
    )
    near(got, want, got.dtype)
    g = jnp.asarray(rng.normal(size=want.shape), jnp.bfloat16)
    for x, y in zip(ours(g.astype(got.dtype)), back(g.astype(jnp.float32))):
        assert x.shape == y.shape and x.dtype == jnp.bfloat16
        near(x, y, x.dtype)


def test_types_are_those_of_the_operands():
    a, b = jnp.ones((3, 4), jnp.bfloat16), jnp.ones((4, 5), jnp.float32)
    y, back = jax.vjp(lambda a, b: contract("xi,io->xo", a, b.astype(jnp.bfloat16), jnp.float32), a, b)
    assert y.dtype == jnp.float32
    assert [g.dtype for g in back(y)] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("queries", [1, 6])  # a step on a cache, and rows
def test_heads(queries):
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 3, 4)), jnp.float32) for n in (queries, 8, 8))
    scores = head_scores(q, k, jnp.float32)
    np.testing.assert_allclose(scores, np.einsum("bqhk,bshk->bhqs", q, k), atol=1e-5)
    np.testing.assert_allclose(head_mix(scores, v), np.einsum("bhqs,bshk->bqhk", scores, v), atol=1e-4)
