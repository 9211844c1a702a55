"""jax's TPU attention kernel, run step by step on CPU, against the plain form; where a kernel may be asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm.config import Config, ConfigError, FlatConfig, HATConfig, HNetConfig, MeshConfig, StackConfig
from bytelm.kernels import check_kernels, on_any_device
from bytelm.nn.attend import attend, causal_mask
from bytelm.nn.splash import splash_attend
from bytelm.parallel.mesh import make_mesh
from bytelm.train.state import plan_state


def inputs(b, t, heads, groups, width, packed):
    rng = np.random.default_rng(t)
    q, k, v = (jnp.asarray(rng.standard_normal((b, t, n, width)), jnp.float32) for n in (heads, groups, groups))
    segments = jnp.asarray(np.cumsum(rng.random((b, t)) < 0.03, axis=1), jnp.int32) if packed else None
    return (q, k, v), segments


@pytest.mark.parametrize(
    "t,window,heads,groups,width,packed",
    [(130, 0, 2, 1, 64, True), (256, 100, 2, 2, 24, False)],
)
def test_splash_equals_plain_with_gradients(t, window, heads, groups, width, packed):
    args, segments = inputs(2, t, heads, groups, width, packed)
    want = jax.vjp(lambda *a: attend(*a, causal_mask(t, window, segments)), *args)
    got = jax.vjp(jax.jit(lambda *a: splash_attend(*a, segments, window, interpret=True)), *args)
    np.testing.assert_allclose(got[0], want[0], atol=5e-6)
    for g, w in zip(got[1](jnp.cos(want[0])), want[1](jnp.cos(want[0]))):
        np.testing.assert_allclose(g, w, atol=2e-5)


def test_each_device_takes_its_rows_and_heads():
    args, segments = inputs(4, 140, 4, 2, 32, True)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        run = jax.jit(lambda q, k, v, s: splash_attend(q, k, v, s, 50, interpret=True))
        got = run(*args, segments)
        assert "all-gather" not in run.lower(*args, segments).compile().as_text()
    np.testing.assert_allclose(got, attend(*args, causal_mask(140, 50, segments)), atol=5e-6)


MODELS = [
    FlatConfig(stack=StackConfig(attention="splash")), HNetConfig(attention="splash"),
    HATConfig(backbone=dataclasses.replace(HATConfig().backbone, attention="splash")),
]  # fmt: skip


@pytest.mark.parametrize("model,where", list(zip(MODELS, ["model.stack", "model", "model.backbone"])))
def test_a_kernel_that_is_not_there_is_refused_for_runs(model, where):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(ConfigError, match=f"^{where}.attention=splash: runs on tpu only, and this is cpu; use auto"):
        plan_state(Config(model=model), mesh)
    check_kernels(model, "tpu")
    check_kernels(on_any_device(model), "cpu")
