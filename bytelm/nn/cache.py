"""What decoding keeps between bytes. Every cache is a pytree with the batch axis first and static shapes."""

from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass
class AttentionCache:
    """Rotated keys and values of past positions, as a ring: position p lies in slot p mod s."""

    k: Float[Array, "*l b s g k"]
    v: Float[Array, "*l b s g k"]


@jax.tree_util.register_dataclass
@dataclass
class Mamba2Cache:
    """The last conv_width - 1 inputs of both convolutions (newest last, zero before the start) and the state."""

    conv_x: Float[Array, "*l b w h p"]
    conv_bc: Float[Array, "*l b w 2 n"]
    state: Float[Array, "*l b h p n"]


@jax.tree_util.register_dataclass
@dataclass
class StackCache:
    """One stack's caches: how many positions each row has seen, and each run's cache with a leading layers axis."""

    lengths: Int[Array, " b"]
    runs: dict[str, Any]
