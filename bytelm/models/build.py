"""From a model config to a network, its parameters, and back."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from bytelm.config import (
    BLTConfig,
    ConfigError,
    DataConfig,
    EntropyConfig,
    FlatConfig,
    HATConfig,
    HNetConfig,
    MegaByteConfig,
    ModelConfig,
    SpaceByteConfig,
    T5Config,
    TokensConfig,
)
from bytelm.data.words import WordRule
from bytelm.models.blt import BLT
from bytelm.models.hat import HAT, hat_ids
from bytelm.models.hnet import HNet
from bytelm.models.megabyte import MegaByte
from bytelm.models.spacebyte import SPACEBYTE_IDS, SpaceByte
from bytelm.models.t5 import T5
from bytelm.models.transformer import FlatModel
from bytelm.vocab import BLT_IDS, FLAT_IDS, HNET_IDS, T5_IDS, ByteIds

Params = dict[str, Any]  # nested dict of arrays


FAMILIES: dict[type, Any] = {
    FlatConfig: FlatModel, TokensConfig: FlatModel, HNetConfig: HNet, T5Config: T5, HATConfig: HAT,
    SpaceByteConfig: SpaceByte, MegaByteConfig: MegaByte, BLTConfig: BLT,
}  # fmt: skip
IDS = {
    FlatConfig: FLAT_IDS, HNetConfig: HNET_IDS, T5Config: T5_IDS, SpaceByteConfig: SPACEBYTE_IDS,
    MegaByteConfig: SPACEBYTE_IDS, BLTConfig: BLT_IDS,
}  # fmt: skip


def build(config: ModelConfig, key: Array) -> Any:
    """The network (`models.base.Network`) of a config with fresh weights. `key` is a typed PRNG key."""
    return FAMILIES[type(config)](config, rngs=nnx.Rngs(params=key))


def byte_ids(config: ModelConfig, reserved: str = "error") -> ByteIds:
    """How the family of this config numbers bytes. Texts that hold bytes the family keeps for itself are refused
    (`reserved` error) or get U+FFFD in their place (replace)."""
    if reserved not in ("error", "replace"):
        raise ConfigError(f"reserved={reserved!r}: choose error or replace")
    if isinstance(config, TokensConfig):
        raise ConfigError("a model of tokens numbers no bytes: load it, and ask through the byte view")
    ids = hat_ids(config) if isinstance(config, HATConfig) else IDS[type(config)]
    return dataclasses.replace(ids, replace=reserved == "replace")


def word_rule(config: ModelConfig) -> WordRule | None:
    """How words of training text are marked for a model that needs it."""
    return WordRule(config.rule, config.max_word) if isinstance(config, HATConfig) else None


def entropy_rule(config: ModelConfig) -> EntropyConfig | None:
    """The entropy model and rule of a model that has one (parameters `patcher/`)."""
    if isinstance(config, BLTConfig) or (isinstance(config, HNetConfig) and config.chunker == "entropy"):
        return config.patcher
    return None


def is_marked(config: ModelConfig, data: DataConfig) -> bool:
    """Whether the pipeline marks the bytes of training rows: words, and patches by entropy that are stored."""
    return isinstance(config, HATConfig) or (entropy_rule(config) is not None and data.marks == "stored")


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
