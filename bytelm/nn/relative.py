"""Attention as T5 has it: no 1 / sqrt(head width), a learned bias by bucketed distance, and optionally softmax1.

Distances are those of the positions handed in, not of slots, so that a sequence with elements taken out keeps the
distances it had. Long rows are done in blocks of queries, each computing the bias it needs: no [b, h, q, s] array of a
whole row is ever held.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bytelm.nn.layers import Dropout, Linear, wide
from bytelm.nn.products import head_mix, head_scores

QUERY_BLOCK = 256  # rows longer than two of them are done in blocks of at most so many queries
HELD_BIAS = 1 << 25  # numbers of a position bias that are computed once for all blocks of a stack


def distance_bucket(distance: Int[Array, "..."], buckets: int, max_distance: int, bidirectional: bool):
    """Bucket of key position - query position (Raffel et al. 2020): one each for short distances, then logarithmic ones
    up to `max_distance`. Bidirectional: half of them for each side; else those in front; keys behind have bucket 0."""
    side: Any = 0
    if bidirectional:
        buckets //= 2
        side = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = jnp.minimum(exact + (ratio * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return side + jnp.where(distance < exact, distance, far)


def softmax1(scores: Float[Array, "*b s"]) -> Float[Array, "*b s"]:
    """exp(s_j) / (1 + sum exp(s)): softmax beside a score of 0 that nothing stands behind, so that a query may attend
    to nothing (Miller 2023). No gradient through the largest score, which only keeps exp in range."""
    top = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1, keepdims=True), 0))
    e = jnp.exp(scores - top)
    return e / (e.sum(axis=-1, keepdims=True) + jnp.exp(-top))


@jax.tree_util.register_dataclass
@dataclass
class Keys:
    """What queries are told of the keys beside the keys themselves; a leading 1 stands for all rows."""

    visible: Bool[Array, "#b #q s"] | None = None  # None: all of them
    gate: Float[Array, "b s"] | None = None  # added to every query's score of a key


@jax.tree_util.register_dataclass
@dataclass
class PositionBias:
    """The bias of a stack's self-attention: a table by bucket and head, and where queries and keys stand."""

    table: Float[Array, "n h"]
    queries: Int[Array, "#b q"]
    keys: Int[Array, "#b s"]
    max_distance: int = field(metadata=dict(static=True))
    bidirectional: bool = field(metadata=dict(static=True))
    whole: Float[Array, "#b h q s"] | None = None

    def held(self) -> "PositionBias":
        """With the whole bias computed, where it is small enough to be kept for all blocks of a stack."""
        (rows, q), s = self.queries.shape, self.keys.shape[1]
        if rows * q * s * self.table.shape[1] > HELD_BIAS:
            return self
        return replace(self, whole=self.of(self.queries))

    def of(self, queries: Int[Array, "#b q"]) -> Float[Array, "#b h q s"]:
        """The bias of some queries."""
        distance = self.keys[:, None, :] - queries[:, :, None]
        bucket = distance_bucket(distance, self.table.shape[0], self.max_distance, self.bidirectional)
        return jnp.moveaxis(self.table[bucket], -1, 1)

    def block(self, first: Int[Array, ""] | int, n: int) -> Float[Array, "#b h n s"]:
        """The bias of queries first .. first + n - 1."""
        if self.whole is not None:
            return jax.lax.dynamic_slice_in_dim(self.whole, first, n, axis=2)
        return self.of(jax.lax.dynamic_slice_in_dim(self.queries, first, n, axis=1))

    def padded(self, more: int) -> "PositionBias":
        """With `more` queries behind the last, whose bias is of no use."""
        queries = jnp.pad(self.queries, ((0, 0), (0, more)))
        whole = None if self.whole is None else jnp.pad(self.whole, ((0, 0), (0, 0), (0, more), (0, 0)))
        return replace(self, queries=queries, whole=whole)


@dataclass(frozen=True)
class Attending:
    """How scores become weights."""

    one: bool = False  # softmax1 instead of softmax
    measure: bool = False  # also give the excess of the scores
    dropout: Dropout = field(default_factory=Dropout)  # of the weights


SCORE_LIMIT = 5.0  # scores above it are what the regulariser asks to be smaller (Kallini et al. 2025, appendix D)


def attend_block(
    q: Float[Array, "b q h k"],
    k: Float[Array, "b s h k"],
    v: Float[Array, "b s h k"],
    bias: Float[Array, "#b h q s"] | None,
    keys: Keys,
    how: Attending,
    real: Int[Array, ""] | int | None = None,
) -> tuple[Float[Array, "b q h k"], Float[Array, ""]]:
    """(weights(q k + bias, masks, gate) v, mean excess of the scores over SCORE_LIMIT before the gate; 0 where not
    measured). Scores and weights in float32 or wider. The excess counts masked keys, and queries from `real` on, as 0.
    """
    kind = wide(q.dtype)
    scores = head_scores(q, k, kind)
    if bias is not None:
        scores += bias.astype(kind)
    if keys.visible is not None:
        scores = jnp.where(keys.visible[:, None], scores, jnp.finfo(kind).min)
    excess = jnp.zeros((), kind)
    if how.measure:
        over = jnp.maximum(scores, SCORE_LIMIT) - SCORE_LIMIT
        if real is not None:
            over = jnp.where(jnp.arange(q.shape[1])[:, None] < real, over, 0)
        excess = over.mean()
    if keys.gate is not None:  # far below any score: a sum with the mask would leave the range of float32
        scores = jnp.maximum(scores + keys.gate[:, None, None].astype(kind), jnp.finfo(kind).min)
    weights = softmax1(scores) if how.one else jax.nn.softmax(scores, axis=-1)
    weights = how.dropout(weights, 0).astype(v.dtype)
    return head_mix(weights, v), excess


def relative_attend(q, k, v, bias: PositionBias | None, keys: Keys, how: Attending):
    """`attend_block` over whole rows: at once where they are short, else block by block, recomputed in the backward
    pass, so that memory grows with t * QUERY_BLOCK and not with t^2."""
    b, t, h, width = q.shape
    if t <= 2 * QUERY_BLOCK:
        whole = None if bias is None else bias.block(0, t) if bias.whole is None else bias.whole
        return attend_block(q, k, v, whole, keys, how)
    blocks = -(-t // QUERY_BLOCK)
    size = -(-t // blocks)  # of equal length, so that little is computed for padding
    more = blocks * size - t
    q = jnp.pad(q, ((0, 0), (0, more), (0, 0), (0, 0)))
    padded = None if bias is None else bias.padded(more)
    visible = keys.visible
    if visible is not None and visible.shape[1] > 1:
        visible = jnp.pad(visible, ((0, 0), (0, more), (0, 0)), constant_values=True)

    @jax.checkpoint
    def one(i):
        first = i * size
        mask = visible
        if mask is not None and mask.shape[1] > 1:
            mask = jax.lax.dynamic_slice_in_dim(mask, first, size, axis=1)
        part = jax.lax.dynamic_slice_in_dim(q, first, size, axis=1)
        own = None if padded is None else padded.block(first, size)
        one_how = replace(how, dropout=how.dropout.fold(i))
        return attend_block(part, k, v, own, Keys(mask, keys.gate), one_how, t - first)

    y, excess = jax.lax.map(one, jnp.arange(blocks))
    y = jnp.moveaxis(y, 0, 1).reshape(b, blocks * size, h, width)[:, :t]
    return y, excess.sum() * (size / t)


class RelativeAttention(nnx.Module):
    """Projections of one attention; the bias comes from outside, since all blocks of a stack share it."""

    def __init__(self, d: int, heads: int, width: int, *, std: tuple[float, float, float], dtype: str, rngs: nnx.Rngs):
        """`std`: of the initial q; k and v; output projections."""
        q, kv, out = std
        self.q = Linear((d,), (heads, width), std=q, dtype=dtype, rngs=rngs)
        self.k = Linear((d,), (heads, width), std=kv, dtype=dtype, rngs=rngs)
        self.v = Linear((d,), (heads, width), std=kv, dtype=dtype, rngs=rngs)
        self.out = Linear((heads, width), (d,), std=out, dtype=dtype, rngs=rngs)

    def project_keys(self, x: Float[Array, "b s d"]) -> tuple[Float[Array, "b s h k"], Float[Array, "b s h k"]]:
        """(keys, values)."""
        return self.k(x), self.v(x)

    def __call__(self, x, k, v, bias: PositionBias | None, keys: Keys, how: Attending):
        """(output [b, q, d], excess) of the queries of `x` over keys and values given."""
        y, excess = relative_attend(self.q(x), k, v, bias, keys, how)
        return self.out(y), excess
