"""What decoding keeps between bytes. Every cache is a pytree with the batch axis first and static shapes.

Beside single steps, modules read several positions at once: `extend` gives outputs and a trail, and `keep` makes of the
cache before and that trail the cache after as many of the positions as each row turns out to want, none included.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass
class AttentionCache:
    """Rotated keys and values of past positions, head by head, as a ring: position p lies in slot p mod s."""

    k: Float[Array, "*l b g s k"]
    v: Float[Array, "*l b g s k"]


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


@jax.tree_util.register_dataclass
@dataclass
class AttentionTrail:
    """Rotated keys and values of positions that may be kept."""

    k: Float[Array, "*l b g q k"]
    v: Float[Array, "*l b g q k"]


@jax.tree_util.register_dataclass
@dataclass
class Mamba2Trail:
    """Inputs of both convolutions, those of the cache in front, and what the recurrence adds to its state."""

    seen_x: Float[Array, "*l b s h p"]
    seen_bc: Float[Array, "*l b s 2 n"]
    x: Float[Array, "*l b q h p"]
    dt: Float[Array, "*l b q h"]
    B: Float[Array, "*l b q n"]


def pick(values: Array, index: Int[Array, " b"]) -> Array:
    """values[i, index[i]] of each row i."""
    return jnp.take_along_axis(values, index.reshape(-1, *(1,) * (values.ndim - 1)), axis=1)[:, 0]


def newest(values: Array, count: Int[Array, " b"], old: Array) -> Array:
    """The last of the first count[i] values of each row i; `old` where there is none."""
    some = (count > 0).reshape(-1, *(1,) * (values.ndim - 2))
    return jnp.where(some, pick(values, jnp.maximum(count - 1, 0)), old)


def if_needed(needed: Bool[Array, ""], run: Callable[[], Any]) -> Any:
    """What `run` gives; zeros of the same shapes, and no work, where it is not `needed`. A trail of zeros is none that
    `keep` can read: see `keep_some`."""
    trees = []

    def leaves():
        found, tree = jax.tree.flatten(run())
        trees.append(tree)
        return found

    nothing = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in jax.eval_shape(leaves)]
    return jax.tree.unflatten(trees[0], jax.lax.cond(needed, leaves, lambda: nothing))


def keep_some(stack: Any, cache: Any, trail: Any, kept: Int[Array, " b"]) -> Any:
    """`stack.keep`, of a trail that was made only if some row has anything to keep."""
    return jax.lax.cond(jnp.any(kept > 0), lambda: stack.keep(cache, trail, kept), lambda: cache)
