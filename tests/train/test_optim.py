"""Schedules, masks, multipliers, and AdamW against a plain numpy version."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm.config import ConfigError, OptimConfig
from bytelm.models.build import structure
from bytelm.parallel.rules import path_string
from bytelm.train.optim import decay_mask, learning_rate, lr_factors, make_optimizer
from tiny import flat

PARAMS = structure(flat())[1]


def rates(steps, **fields):
    rate = learning_rate(OptimConfig(**fields), steps)
    return np.array([float(rate(s)) for s in range(steps)])


def test_wsd():
    r = rates(100, lr=2.0, schedule="wsd", warmup_steps=10, decay_fraction=0.2, final_lr=0.1)
    np.testing.assert_allclose(r[:10], 0.2 * np.arange(1, 11), rtol=1e-6)
    np.testing.assert_allclose(r[10:80], 2.0, rtol=1e-6)
    progress = np.arange(1, 21) / 20
    np.testing.assert_allclose(r[80:], 2.0 * (0.1 + 0.9 * (1 - np.sqrt(progress))), rtol=1e-5)


def test_cosine_linear_constant():
    r = rates(110, lr=1.0, schedule="cosine", warmup_steps=10)
    np.testing.assert_allclose(r[10:], 0.5 * (1 + np.cos(np.pi * np.arange(1, 101) / 100)), atol=1e-6)
    r = rates(110, lr=1.0, schedule="linear", warmup_steps=10, final_lr=0.5)
    np.testing.assert_allclose(r[10:], 1 - 0.5 * np.arange(1, 101) / 100, atol=1e-6)
    assert (rates(5, lr=1.0, schedule="constant", warmup_steps=0) == 1).all()
    assert rates(3, lr=1.0, warmup_steps=1000, schedule="constant")[-1] == 1.0  # a warm-up longer than the run fits it


def test_decay_applies_to_matrices_only():
    mask = {path_string(p): m for p, m in jax.tree.leaves_with_path(decay_mask(OptimConfig(), PARAMS))}
    decayed = {p for p, m in mask.items() if m}
    assert "stack/run0/mamba/x/kernel" in decayed and "stack/run1/mlp/down/kernel" in decayed
    for path in ("embed/table", "stack/norm/scale", "stack/run0/mamba/A_log", "stack/run0/mamba/D",
                 "stack/run0/mamba/dt_bias", "stack/run0/mamba/conv_x/bias",
                 "stack/run0/mamba/norm/scale"):  # fmt: skip
        assert path not in decayed, path


def test_multipliers():
    config = OptimConfig(lr_multipliers=(("mamba/x", 3.0), ("mamba", 0.5)))
    factors = {path_string(p): f for p, f in jax.tree.leaves_with_path(lr_factors(config, PARAMS))}
    assert factors["stack/run0/mamba/x/kernel"] == 3.0
    assert factors["stack/run0/mamba/z/kernel"] == 0.5
    assert factors["stack/run1/mlp/up/kernel"] == 1.0
    with pytest.raises(ConfigError, match="'atention' matches no parameter"):
        lr_factors(OptimConfig(lr_multipliers=(("atention", 2.0),)), PARAMS)


def test_adamw_equals_numpy():
    """Clipping, both moments with bias correction, decoupled decay, multiplier and schedule, over five steps."""
    config = OptimConfig(lr=0.1, schedule="linear", warmup_steps=2, weight_decay=0.3, clip_norm=1.0, no_decay=("b",),
                         lr_multipliers=(("b", 0.25),))  # fmt: skip
    rng = np.random.default_rng(0)
    params = {"a": rng.standard_normal((3, 2)), "b": rng.standard_normal(4)}
    moments = {k: (np.zeros_like(v), np.zeros_like(v)) for k, v in params.items()}
    ours = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    optimizer = make_optimizer(config, 5, ours)
    opt, rate = optimizer.init(ours), learning_rate(config, 5)
    for step in range(5):
        grads = {k: 2 * rng.standard_normal(v.shape) for k, v in params.items()}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for k, p in params.items():
            g = grads[k] / max(norm, 1.0)
            m, v = (config.b1 * moments[k][0] + (1 - config.b1) * g, config.b2 * moments[k][1] + (1 - config.b2) * g**2)
            moments[k] = (m, v)
            update = (m / (1 - config.b1 ** (step + 1))) / (np.sqrt(v / (1 - config.b2 ** (step + 1))) + config.eps)
            update += 0.3 * p if k == "a" else 0
            params[k] = p - float(rate(step)) * (0.25 if k == "b" else 1.0) * update
        updates, opt = optimizer.update(jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads), opt, ours)
        ours = jax.tree.map(lambda p, u: p + u, ours, updates)
    for k, p in params.items():
        np.testing.assert_allclose(ours[k], p, rtol=2e-5, atol=2e-6)
