"""Attention of rows that are cut into pieces over devices (Liu et al. 2023, "Ring attention"): keys and values go round
all pieces, and each piece's queries meet them block by block. A piece holds the keys of another while it reads them.

The softmax is kept as its maximum and sum so far (Milakov & Gimelshein 2018). The backward pass makes the weights again
from their logarithmic sum, as keys, values and their gradients go round once more.

Inside, queries of a kv head stand together: [b, g, shared * q, k], where h = g * shared.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bytelm.nn.layers import wide
from bytelm.parallel import sequence
from bytelm.parallel.mesh import unroll

OUTSIDE = -2  # segment of what fills up a last block of keys

# Under a scan over layers that are rematerialised, jax would make all masks in advance, since they depend on segments
# alone, and keep them: [turns, blocks, blocks, ...]. It leaves the inside of a checkpoint as it is.
_unsplit = partial(jax.checkpoint, prevent_cse=False)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def ring_attend(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    segments: Int[Array, "b t"],
    window: int,
    block: int,
    keys: int,
) -> Float[Array, "b t h k"]:
    """Causal attention of this piece's queries to the keys of all pieces, of their own segment and, with a window, the
    last ones; to be called in `sequence.over_pieces`. `block` queries meet `keys` keys at a time."""
    return _forward(q, k, v, segments, window, block, keys)[0]


def _forward(q, k, v, segments, window, block, keys):
    t, g, kind = q.shape[1], k.shape[2], wide(q.dtype)
    queries = _Queries(q, segments, g, block, window)

    def meet_piece(sums, owner, theirs):
        k, v, seen = _blocks_of_keys(theirs, keys)

        def meet(i, q, sums):
            @_unsplit
            def one(sums, now):
                (top, total, y), (k, v, segments, place) = sums, now
                scores = queries.scores(i, q, k, segments, owner * t + place, kind)
                higher = jnp.maximum(top, scores.max(-1))
                weights, before = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
                mixed = jnp.einsum("bgqs,bgsk->bgqk", weights.astype(v.dtype), v, preferred_element_type=kind)
                return (higher, before * total + weights.sum(-1), before[..., None] * y + mixed), None

            return jax.lax.scan(one, sums, (k, v, *seen))[0]

        return jax.lax.map(lambda now: meet(*now), (jnp.arange(queries.count), queries.blocks, sums))

    top = jnp.full(queries.blocks.shape[:-1], jnp.finfo(kind).min, kind)
    sums = (top, jnp.zeros_like(top), jnp.zeros(queries.blocks.shape, kind))
    top, total, y = sequence.shown_round(meet_piece, sums, (k, v, segments))
    y, log_total = (y / total[..., None]).astype(q.dtype), top + jnp.log(total)
    return queries.joined(y), (q, k, v, segments, y, log_total)


def _backward(window, block, keys, kept, dy):
    q, k, v, segments, y, log_total = kept
    t, g, kind = q.shape[1], k.shape[2], wide(q.dtype)
    queries = _Queries(q, segments, g, block, window)
    dy = queries.cut(dy)
    inner = jnp.sum(dy.astype(kind) * y.astype(kind), -1)
    every = (jnp.arange(queries.count), queries.blocks, dy, log_total, inner)

    def turn(now, moves):
        dq, theirs, dk, dv = now
        owner = sequence.owner_after(moves)
        k, v, seen = _blocks_of_keys(theirs, keys)

        def meet(sums, now):
            i, q, dy, log_total, inner = now

            @_unsplit
            def one(dq, now):
                k, v, segments, place = now
                scores = queries.scores(i, q, k, segments, owner * t + place, kind)
                weights = jnp.exp(scores - log_total[..., None])
                weights = jnp.where(scores > jnp.finfo(kind).min, weights, 0)
                dv = jnp.einsum("bgqs,bgqk->bgsk", weights.astype(dy.dtype), dy, preferred_element_type=kind)
                ds = jnp.einsum("bgqk,bgsk->bgqs", dy, v, preferred_element_type=kind) - inner[..., None]
                ds = (weights * ds * q.shape[-1] ** -0.5).astype(q.dtype)
                dk = jnp.einsum("bgqs,bgqk->bgsk", ds, q, preferred_element_type=kind)
                return dq + jnp.einsum("bgqs,bgsk->bgqk", ds, k, preferred_element_type=kind), (dk, dv)

            dq, added = jax.lax.scan(one, jnp.zeros(q.shape, kind), (k, v, *seen))
            return jax.tree.map(jnp.add, sums, added), dq

        nothing = jnp.zeros(k.shape, kind)
        (more_k, more_v), more_q = jax.lax.scan(meet, (nothing, nothing), every)
        dk, dv = (x + _joined_keys(more, t) for x, more in ((dk, more_k), (dv, more_v)))
        return (dq + more_q, *sequence.onward((theirs, dk, dv))), None

    nothing = jnp.zeros(k.shape, kind)
    begin = (jnp.zeros(queries.blocks.shape, kind), (k, v, segments), nothing, nothing)
    pieces = jnp.arange(jax.lax.axis_size(sequence.AXIS))
    (dq, _, dk, dv), _ = jax.lax.scan(turn, begin, pieces, unroll=unroll())
    return queries.joined(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


ring_attend.defvjp(_forward, _backward)


class _Queries:
    """The queries of a piece in blocks [n, b, g, shared * q, k]; the last one is filled up."""

    def __init__(self, q, segments, g, block, window):
        self.t, self.window, self.g = q.shape[1], window, g
        self.shared, self.size = q.shape[2] // g, min(block, q.shape[1])
        self.blocks = self.cut(q)
        self.count = len(self.blocks)
        self.segments = _cut(segments, self.size, -1)

    def cut(self, x):
        x = _cut(x, self.size)  # [n, b, q, h, k]
        x = jnp.moveaxis(x.reshape(*x.shape[:3], self.g, self.shared, x.shape[-1]), 2, 4)
        return x.reshape(*x.shape[:3], self.shared * self.size, x.shape[-1])

    def joined(self, x):
        """[b, t, h, k] of what was cut."""
        n, b, width = len(x), x.shape[1], x.shape[-1]
        x = jnp.moveaxis(x.reshape(n, b, self.g, self.shared, self.size, width), (0, 4), (1, 2))
        return x.reshape(b, n * self.size, self.g * self.shared, width)[:, : self.t]

    def scores(self, i, q, k, segments, place, kind):
        """Products of block i's queries and keys that stand at `place`; the least number where one is not seen."""
        at = sequence.number() * self.t + i * self.size + jnp.arange(self.size)[:, None]
        mask = (place <= at) & ((place > at - self.window) if self.window else True)
        mask = mask & (self.segments[i][:, :, None] == segments[:, None])
        scores = jnp.einsum("bgqk,bgsk->bgqs", q, k, preferred_element_type=kind) * q.shape[-1] ** -0.5
        each = scores.reshape(*scores.shape[:2], self.shared, self.size, -1)
        return jnp.where(mask[:, None, None], each, jnp.finfo(kind).min).reshape(scores.shape)


def _cut(x, size, fill=0):
    """[b, t, ...] in blocks [n, b, size, ...]."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _blocks_of_keys(shown, keys):
    """Keys and values in blocks [n, b, g, s, k], and of each block segments [b, s] and places in the piece."""
    k, v, segments = shown
    size = min(keys, k.shape[1])
    segments = _cut(segments, size, OUTSIDE)
    place = jnp.arange(len(segments) * size).reshape(-1, size)
    k, v = (jnp.swapaxes(_cut(x, size), 2, 3) for x in (k, v))
    return k, v, (segments, place)


def _joined_keys(x, t):
    n, b, g, size, width = x.shape
    return jnp.moveaxis(x, (0, 3), (1, 2)).reshape(b, n * size, g, width)[:, :t]
