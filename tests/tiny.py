"""Tiny configs and helpers that several tests share."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bytelm.config import (
    BLTConfig,
    CapacityConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DeletionConfig,
    EntropyConfig,
    EvalConfig,
    FlatConfig,
    HATConfig,
    HNetConfig,
    MegaByteConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    SpaceByteConfig,
    SSMConfig,
    StackConfig,
    T5Config,
    TrainConfig,
)  # fmt: skip
from bytelm.models.build import init_params, structure
from bytelm.parallel.rules import path_string

SSM = SSMConfig(d_state=4, head_dim=8, chunk=8)
# Heads divide by 4 (attention and Mamba), so that the mesh tests can split them.
HYBRID = StackConfig(layout="m1T1", d_model=32, num_heads=4, num_kv_heads=4, d_mlp=64, window=5, ssm=SSM)
FULL = StackConfig(layout="T2", d_model=32, num_heads=4, num_kv_heads=2, d_mlp=48)


# Cases much like others that run: about half a minute to two minutes each.
LONG = [pytest.mark.slow, pytest.mark.skipif("BYTELM_EVERY_CASE" not in os.environ, reason="set BYTELM_EVERY_CASE=1")]


def mostly_slow(cases, *fast):
    """The cases of a parametrized test, all but some marked slow."""
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def hnet(levels: int = 2, **fields) -> HNetConfig:
    """A tiny H-Net whose heads divide by 4; all block kinds, windows, two widths."""
    shape = {
        1: dict(arch_layout="m1t1,[T1M1],T1m1", d_model=(32, 64), window=(7, 4), targets=(3.0,)),
        2: dict(arch_layout="m1,[T1m1,[T1],m1T1],m1", d_model=(32, 32, 64), window=(0, 5, 0), targets=(3.0, 2.5)),
    }[levels]
    capacity = CapacityConfig(start=(1.0,), every=0, multiple=4)
    return HNetConfig(**{**shape, "num_heads": (4,), "d_mlp": (64,), "ssm": SSM, "capacity": capacity, **fields})


def hat(**fields) -> HATConfig:
    """A tiny HAT whose heads divide by 4; a window, fewer key than query heads, norms of queries and keys."""
    local = StackConfig(layout="T2", d_model=32, num_heads=4, d_mlp=48, window=9)
    main = StackConfig(layout="T2", d_model=48, num_heads=4, d_mlp=64, qk_norm="head")
    shape = dict(encoder=local, backbone=main, decoder=local, pool_heads=4, pool_norm="all", guide_heads=4, max_word=12)
    return HATConfig(**{**shape, "capacity": CapacityConfig(start=(1.0,), every=0, multiple=4), **fields})


SLAGLE = dict(norm="layer", qk_norm="head", mlp="relu", num_heads=4)


def spacebyte(**fields) -> SpaceByteConfig:
    local = StackConfig(layout="T1", d_model=32, d_mlp=64, window=9, **SLAGLE)
    main = StackConfig(layout="T2", d_model=64, d_mlp=64, **SLAGLE)
    capacity = CapacityConfig(start=(1.0,), every=0, multiple=4)
    return SpaceByteConfig(**{**dict(initial=local, main=main, final=local, capacity=capacity), **fields})


def megabyte(**fields) -> MegaByteConfig:
    local = StackConfig(layout="T1", d_model=32, d_mlp=64, **SLAGLE)
    main = StackConfig(layout="T2", d_model=64, d_mlp=64, **SLAGLE)
    capacity = CapacityConfig(start=(1.0,), every=0, multiple=4)
    return MegaByteConfig(**{**dict(patch=4, main=main, local=local, capacity=capacity), **fields})


def entropy(**fields) -> EntropyConfig:
    """A rule whose model finds some of the bytes of a random network's texts hard, and others not."""
    stack = StackConfig(layout="T2", d_model=16, num_heads=2, d_mlp=32, window=6)
    return EntropyConfig(**{**dict(stack=stack, threshold=5.4628), **fields})


def blt(**fields) -> BLTConfig:
    """A tiny BLT whose heads divide by 4; windows, fewer key than query heads in the decoder."""
    local = StackConfig(layout="T1", d_model=32, num_heads=4, d_mlp=48, window=9)
    decoder = dataclasses.replace(local, layout="T2", num_kv_heads=2)
    shape = dict(encoder=local, main=StackConfig(layout="T2", d_model=48, num_heads=4, d_mlp=64), decoder=decoder)
    shape |= dict(ngrams=(2, 5), hash_size=96, patcher=entropy())
    return BLTConfig(**{**shape, "capacity": CapacityConfig(start=(1.0,), every=0, multiple=4), **fields})


def flat(stack: StackConfig = HYBRID, **fields) -> FlatConfig:
    return FlatConfig(stack=stack, **fields)


def network(config: ModelConfig, seed: int = 0, scale: float = 5.0):
    """A network with larger weights than fresh ones and norms and biases off 1 and 0, so that every path matters."""
    graph, _ = structure(config)
    params = init_params(config, jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def enlarge(path, p):
        name = path_string(path)
        if "router/" in name or "residual/kernel" in name:  # identity and zero at first
            return p + jnp.asarray(0.15 * rng.standard_normal(p.shape), jnp.float32)
        if name.endswith(("kernel", "table")) and "conv" not in name:
            return p * scale
        return p + jnp.asarray(0.1 * rng.standard_normal(p.shape), jnp.float32)

    params = jax.tree.map_with_path(enlarge, params)
    return nnx.merge(graph, params), params


def by_path(params, dtype=np.float64) -> dict[str, np.ndarray]:
    return {path_string(p): np.asarray(x, dtype) for p, x in jax.tree.leaves_with_path(params)}


def run_config(run_dir, *, steps: int = 6, **sections) -> Config:
    """A training run of seconds; sections override fields: run_config(dir, train={"log_every": 1})."""
    config = Config(
        model=flat(),
        data=DataConfig(
            train=("bundled:shakespeare[:50000]",), valid=("bundled:shakespeare[1003854:1006000]",), seq_len=32,
            batch_size=8,
        ),
        optim=OptimConfig(lr=3e-3, warmup_steps=2),
        mesh=MeshConfig(),
        train=TrainConfig(run_dir=str(run_dir), steps=steps, log_every=1),
        eval=EvalConfig(every=0, max_bytes=512, final_max_bytes=512),
        checkpoint=CheckpointConfig(every=2),
    )  # fmt: skip
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    )


def t5(kind: str = "learned", **fields) -> T5Config:
    """A tiny encoder-decoder whose heads divide by 4, with something that shortens its encoder."""
    deletion = DeletionConfig(kind=kind, layer=1, **fields.pop("deletion", {}))
    shape = dict(d_model=32, num_heads=4, head_dim=6, d_mlp=48, encoder_layers=3, decoder_layers=2, softmax_one=True)
    return T5Config(**{**shape, "deletion": deletion, **fields})


def seq2seq_batch(b: int = 3, t: int = 20, s: int = 9, seed: int = 0) -> dict[str, jax.Array]:
    """Random sources and targets of unequal length, padded."""
    rng = np.random.default_rng(seed)
    source, targets = (rng.integers(3, 259, (b, n)).astype(np.int32) for n in (t, s))
    lengths = rng.integers(t // 2, t + 1, b), rng.integers(s // 2, s + 1, b)
    lengths[0][0], lengths[1][0] = t, s
    for i in range(b):
        for ids, length in ((source, lengths[0][i]), (targets, lengths[1][i])):
            ids[i, length - 1], ids[i, length:] = 1, 0
    segments = (targets > 0).astype(np.int32)
    inputs = np.roll(targets, 1, axis=1)
    inputs[:, 0] = 0
    arrays = {"source": source, "inputs": inputs * segments, "targets": targets, "segments": segments}
    return jax.tree.map(jnp.asarray, arrays)
