"""From a model config to a network, its parameters, and back."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from bytelm.config import ConfigError, FlatConfig, HNetConfig, ModelConfig, T5Config
from bytelm.models.hnet import HNet
from bytelm.models.t5 import T5
from bytelm.models.transformer import FlatModel
from bytelm.vocab import FLAT_IDS, HNET_IDS, T5_IDS, ByteIds

Params = dict[str, Any]  # nested dict of arrays


def build(config: ModelConfig, key: Array) -> FlatModel | HNet | T5:
    """The network of a config with fresh weights. `key` is a typed PRNG key."""
    rngs = nnx.Rngs(params=key)
    if isinstance(config, FlatConfig):
        return FlatModel(config, rngs=rngs)
    return HNet(config, rngs=rngs) if isinstance(config, HNetConfig) else T5(config, rngs=rngs)


def byte_ids(config: ModelConfig, reserved: str = "error") -> ByteIds:
    """How the family of this config numbers bytes. Texts that hold bytes the family keeps for itself are refused
    (`reserved` error) or get U+FFFD in their place (replace)."""
    if reserved not in ("error", "replace"):
        raise ConfigError(f"reserved={reserved!r}: choose error or replace")
    ids = {FlatConfig: FLAT_IDS, HNetConfig: HNET_IDS, T5Config: T5_IDS}[type(config)]
    return dataclasses.replace(ids, replace=reserved == "replace")


def structure(config: ModelConfig) -> tuple[nnx.GraphDef, Params]:
    """The network without weights: its graph, and the shapes of its parameters as a nested dict. Allocates nothing."""
    model = jax.eval_shape(lambda: build(config, jax.random.key(0)))
    graph, state = nnx.split(model, nnx.Param)
    return graph, nnx.to_pure_dict(state)


def init_params(config: ModelConfig, key: Array) -> Params:
    """Fresh parameters as a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.split(build(config, key), nnx.Param)[1])


def count_parameters(params: Params) -> int:
    """Number of parameters in a nested dict of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
