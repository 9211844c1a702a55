"""AdamW, schedules, per-parameter learning-rate multipliers and frozen parameters, from OptimConfig."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from bytelm.config import ConfigError, HNetConfig, ModelConfig, OptimConfig
from bytelm.models.build import Params
from bytelm.models.hnet_recipe import lr_multipliers, reference_decays, stage_of
from bytelm.parallel.rules import path_string


def learning_rate(config: OptimConfig, steps: int) -> Callable:
    """Learning rate of each step 0 .. steps - 1: linear warm-up, then the schedule down to final_lr x peak.

    wsd: constant, then 1 - sqrt over the last `decay_fraction` (Hägele et al. 2024).
    """
    warmup = min(config.warmup_steps, steps)
    decay = max(int(steps * config.decay_fraction), 1)

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum((step + 1) / max(warmup, 1), 1.0) if warmup else 1.0
        if config.schedule == "wsd":
            progress = jnp.clip((step + 1 - (steps - decay)) / decay, 0.0, 1.0)
            shape = 1 - jnp.sqrt(progress)
        else:
            progress = jnp.clip((step + 1 - warmup) / max(steps - warmup, 1), 0.0, 1.0)
            shape = {"cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress)), "linear": 1 - progress, "constant": 1.0}[
                config.schedule
            ]
        return config.lr * rise * (config.final_lr + (1 - config.final_lr) * shape)

    return rate


def decay_mask(config: OptimConfig, params: Params) -> Params:
    """True where weight decay applies: parameters whose path no pattern of `no_decay` finds, or what the released H-Net
    code decays (`decay: hnet_reference`)."""
    if config.decay == "hnet_reference":
        return jax.tree.map_with_path(lambda path, _: reference_decays(path_string(path)), params)
    return jax.tree.map_with_path(
        lambda path, _: not any(re.search(p, path_string(path)) for p in config.no_decay), params
    )


def lr_factors(config: OptimConfig, params: Params, model: ModelConfig | None = None) -> Params:
    """Learning-rate multiplier of each parameter: the first pattern that its path matches, else that of its stage
    (H-Net), else 1.

    Raises ConfigError for a pattern that matches no parameter.
    """
    used = set()
    stages = lr_multipliers(model) if isinstance(model, HNetConfig) else None

    def factor(path, _):
        name = path_string(path)
        for pattern, value in config.lr_multipliers:
            if re.search(pattern, name):
                used.add(pattern)
                return value
        return stages[stage_of(name)] if stages else 1.0

    factors = jax.tree.map_with_path(factor, params)
    for pattern, _ in config.lr_multipliers:
        if pattern not in used:
            raise ConfigError(
                f"optim.lr_multipliers: {pattern!r} matches no parameter (or an earlier pattern took all)"
            )
    return factors


NEVER = 2**31 - 1  # steps: a parameter that is not trained at all


def held_steps(config: OptimConfig, params: Params) -> Params:
    """For how many steps each parameter stays as it is: the first pattern of `freeze` that its path matches; NEVER for
    entropy models, whose cuts are data; else 0. Raises ConfigError for a pattern that matches no parameter."""
    used = set()

    def steps(path, _):
        name = path_string(path)
        if name.startswith("patcher/"):
            return NEVER
        for pattern, n in config.freeze:
            if re.search(pattern, name):
                used.add(pattern)
                return n
        return 0

    held = jax.tree.map_with_path(steps, params)
    for pattern, _ in config.freeze:
        if pattern not in used:
            raise ConfigError(f"optim.freeze: {pattern!r} matches no parameter (or an earlier pattern took all)")
    return held


def hold(held: Params) -> optax.GradientTransformation:
    """Zero in place of the updates of parameters that stay as they are."""

    def init(params):
        return {"held": jnp.zeros((), jnp.int32)}

    def update(updates, state, params=None):
        kept = jax.tree.map(lambda u, n: jnp.where(state["held"] < n, 0, u) if n else u, updates, held)
        return kept, {"held": state["held"] + 1}

    return optax.GradientTransformation(init, update)


def make_optimizer(
    config: OptimConfig, steps: int, params: Params, model: ModelConfig | None = None
) -> optax.GradientTransformation:
    """Clip, Adam, decoupled decay, multipliers, schedule; frozen parameters neither count nor move. `params` may be
    shapes."""
    rate = learning_rate(config, steps)
    factors = lr_factors(config, params, model)
    scale = optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u if f == 1.0 else u * f, updates, factors))
    held = held_steps(config, params)
    frozen = [hold(held)] if any(jax.tree.leaves(held)) else []  # no part of the state of runs that freeze nothing
    return optax.chain(
        *frozen,
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(config, params)),
        scale,
        optax.scale_by_schedule(lambda step: -rate(step)),
        *frozen,
    )
