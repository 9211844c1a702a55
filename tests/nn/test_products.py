"""Matrix products with gradients laid out by hand against einsum's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm.nn.products import contract, head_mix, head_scores


@pytest.mark.parametrize(
    "spec,a,b",
    [
        ("xyi,io->xyo", (2, 3, 4), (4, 5)),
        ("xijk,ijko->xo", (3, 2, 4, 5), (2, 4, 5, 6)),
        ("xi,ijk->xjk", (3, 4), (4, 2, 5)),
        ("xyd,vd->xyv", (2, 3, 4), (5, 4)),
        ("bhqk,bhsk->bhqs", (2, 3, 4, 5), (2, 3, 6, 5)),
        ("bhqs,bshk->bqhk", (2, 3, 4, 6), (2, 6, 3, 5)),
        ("bqn,bhpn->bqhp", (2, 3, 4), (2, 5, 6, 4)),
        ("bshp,bsn->bhpn", (2, 3, 4, 5), (2, 3, 6)),
        ("i,i->", (4,), (4,)),
    ],
)
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
