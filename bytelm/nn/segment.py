"""Reductions over segments of a row: which segment each position is of is data, how many there are is static."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bytelm.nn.layers import wide


def segment_softmax(
    scores: Float[Array, "b t h"], values: Float[Array, "b t h k"], segment: Int[Array, "b t"], segments: int
) -> Float[Array, "b c h k"]:
    """softmax over each segment's positions, times their values, in float32 or wider; zero where a segment is empty.

    Positions whose segment is not in 0 .. segments - 1 are left out. Work and memory are those of the positions."""
    kind = wide(values.dtype)
    place = jnp.where((segment >= 0) & (segment < segments), segment, segments)

    def row(scores, values, place):
        top = jnp.full((segments + 1, scores.shape[-1]), -jnp.inf, kind).at[place].max(scores)
        top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
        weight = jnp.exp(scores - top[place])
        mass = jnp.zeros((segments + 1, weight.shape[-1]), kind).at[place].add(weight)
        total = jnp.zeros((segments + 1, *values.shape[1:]), kind).at[place].add(weight[..., None] * values)
        return (total / jnp.where(mass > 0, mass, 1)[..., None])[:segments]

    return jax.vmap(row)(scores.astype(kind), values.astype(kind), place)


def segment_max(x: Float[Array, "b t d"], segment: Int[Array, "b t"], segments: int) -> Float[Array, "b c d"]:
    """The largest of each feature over each segment's positions; zero where a segment is empty.

    Positions whose segment is not in 0 .. segments - 1 are left out."""
    place = jnp.where((segment >= 0) & (segment < segments), segment, segments)

    def row(x, place):
        top = jnp.full((segments + 1, x.shape[-1]), -jnp.inf, x.dtype).at[place].max(x)[:segments]
        return jnp.where(jnp.isneginf(top), 0, top)

    return jax.vmap(row)(x, place)


def running_last(mark: Bool[Array, "b t"], value: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """At each position the value at the last mark at or before it; values at marks never fall; 0 before the first."""
    return jax.lax.cummax(jnp.where(mark, value, 0), axis=1)
