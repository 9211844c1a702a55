"""The flat model against its numpy twin, its gradients against finite differences, its FLOPs against a count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import twin
from bytelm.config import SSMConfig, StackConfig, parse_layout
from bytelm.models.build import count_parameters, init_params, structure
from bytelm.models.flops import forward_flops, mean_keys
from bytelm.parallel.rules import path_string
from bytelm.train.losses import token_nll
from tiny import FULL, HYBRID, by_path, flat, network

CASES = [
    flat(HYBRID),
    flat(FULL, tie_embeddings=False),
    flat(StackConfig(layout="M1t1", d_model=24, num_heads=3, head_dim=6, rope_dim=4, rope_theta=100.0,
                     ssm=SSMConfig(d_state=3, head_dim=12, expand=1, chunk=5))),
]  # fmt: skip


@pytest.mark.parametrize("config", CASES, ids=lambda c: c.stack.layout)
def test_logits_equal_numpy_twin(x64, config):
    _, params = network(config)
    model = _widen(config, params)
    ids = np.random.default_rng(3).integers(0, 257, 17)
    want = twin.flat(ids, by_path(params), config, parse_layout(config.stack.layout))
    got = model(jnp.asarray(ids[None], jnp.int32)).logits[0]
    np.testing.assert_allclose(got, want, atol=1e-9)


def _widen(config, params):
    """The same network computing in float64 (DType has no such member: tests only)."""
    wide = object.__new__(type(config))
    for name, value in vars(config).items():
        object.__setattr__(wide, name, value)
    object.__setattr__(wide, "dtype", "float64")
    graph, _ = structure(wide)
    return nnx.merge(graph, jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params))


def test_gradients_equal_finite_differences(x64):
    config = CASES[2]
    _, params = network(config, scale=3.0)
    graph = nnx.split(_widen(config, params), nnx.Param)[0]
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
    rng = np.random.default_rng(0)
    ids, targets = (jnp.asarray(rng.integers(0, 257, (2, 9)), jnp.int32) for _ in range(2))
    loss = jax.jit(lambda p: jnp.mean(token_nll(nnx.merge(graph, p)(ids).logits, targets)))
    grads = jax.grad(loss)(params)
    for _ in range(3):  # random directions through all parameters at once
        direction = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape)), params)
        up, down = (jax.tree.map(lambda p, v, e=e: p + e * v, params, direction) for e in (1e-5, -1e-5))
        numeric = float(loss(up) - loss(down)) / 2e-5
        exact = sum(float(jnp.vdot(g, v)) for g, v in zip(jax.tree.leaves(grads), jax.tree.leaves(direction)))
        np.testing.assert_allclose(exact, numeric, rtol=1e-6)
    # and every parameter on its own, so that a missing path cannot hide in the sum
    for path, g in jax.tree.leaves_with_path(grads):
        assert np.abs(np.asarray(g)).max() > 0, path_string(path)


def test_useful_flops_equal_a_count_of_the_matmuls():
    """By hand for one tiny block of each kind, rows of 4."""
    stack = StackConfig(layout="T1", d_model=8, num_heads=2, num_kv_heads=1, head_dim=3, rope_dim=2, d_mlp=16)
    projections = 2 * 8 * (6 + 3 + 3) + 2 * 6 * 8
    scores_and_values = 2 * (2 * 3) * 2 * (1 + 2 + 3 + 4) / 4
    assert forward_flops(flat(stack), 4) == projections + scores_and_values + 3 * 2 * 8 * 16 + 2 * 8 * 257
    ssm = StackConfig(layout="m1", d_model=8, ssm=SSMConfig(d_state=5, head_dim=4, expand=2))
    assert forward_flops(flat(ssm), 4) == 2 * 8 * (16 + 16 + 10 + 4) + 2 * 16 * 8 + 2 * 2 * 16 * 5 + 2 * 8 * 257


@pytest.mark.parametrize("t,window", [(10, 0), (10, 3), (10, 10), (3, 7)])
def test_mean_keys(t, window):
    assert mean_keys(t, window) == pytest.approx(np.mean([min(i + 1, window or t) for i in range(t)]))


def test_structure_allocates_nothing_and_matches_init():
    config = flat(HYBRID)
    _, shapes = structure(config)
    params = init_params(config, jax.random.key(0))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert count_parameters(shapes) == count_parameters(params)


def test_initial_loss_is_near_uniform():
    config = flat(HYBRID)
    model = nnx.merge(structure(config)[0], init_params(config, jax.random.key(0)))
    ids = jnp.arange(60, dtype=jnp.int32)[None]
    assert float(jnp.mean(token_nll(model(ids).logits, ids[:, ::-1]))) == pytest.approx(np.log(257), abs=0.1)
