"""Causal grouped-query attention: full, banded where a window saves work, and one step against a cache."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bytelm.config import StackConfig
from bytelm.nn.cache import AttentionCache, AttentionTrail
from bytelm.nn.layers import HeadNorm, Linear, rotate, wide
from bytelm.nn.products import head_mix, head_scores
from bytelm.parallel import sequence
from bytelm.parallel.mesh import platform, shard


def attend(
    q: Float[Array, "b q h k"], k: Float[Array, "b s g k"], v: Float[Array, "b s g k"], mask: Bool[Array, "#b q s"]
) -> Float[Array, "b q h k"]:
    """softmax(q k / sqrt(head width)) v where mask is True; softmax in float32 or wider; query head i reads kv head
    i // (h / g). A row that may see nothing gives the mean of v (finite, and of no use)."""
    b, t, h, width = q.shape
    g, s = k.shape[2], k.shape[1]
    kind, shared = wide(q.dtype), h // g
    if shared > 1:  # as more queries of the head that they read
        q = jnp.moveaxis(q.reshape(b, t, g, shared, width), 3, 1).reshape(b, shared * t, g, width)
    scores = head_scores(q, k, kind).reshape(b, g, shared, t, s)
    scores = jnp.where(mask[:, None, None], scores * width**-0.5, jnp.finfo(kind).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = head_mix(weights.reshape(b, g, shared * t, s), v)
    return jnp.moveaxis(y.reshape(b, shared, t, g, width), 1, 3).reshape(b, t, h, width)


def attend_cached(q: Float[Array, "b q h k"], cache: AttentionCache, mask: Bool[Array, "#b q s"]) -> Array:
    """`attend` to a cache."""
    b, t, h, width = q.shape
    g, s = cache.k.shape[1:3]
    kind, shared = wide(q.dtype), h // g
    q = jnp.swapaxes(q, 1, 2).reshape(b, g, shared * t, width)
    scores = jnp.einsum("bgqk,bgsk->bgqs", q, cache.k, preferred_element_type=kind).reshape(b, g, shared, t, s)
    scores = jnp.where(mask[:, None, None], scores * width**-0.5, jnp.finfo(kind).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(cache.v.dtype)
    y = jnp.einsum("bgqs,bgsk->bgqk", weights.reshape(b, g, shared * t, s), cache.v)
    return jnp.swapaxes(y.reshape(b, h, t, width), 1, 2)


def causal_mask(t: int, window: int, segments: Int[Array, "b t"] | None) -> Bool[Array, "#b t t"]:
    """Which keys each query may see: not later ones, at most `window` (0 = all), only its own segment."""
    behind = jnp.arange(t)[:, None] - jnp.arange(t)[None, :]
    mask = (behind >= 0) & ((behind < window) if window else True)
    if segments is None:
        return mask[None]
    return mask[None] & (segments[:, :, None] == segments[:, None, :])


def banded_attend(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    window: int,
    segments: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t h k"]:
    """Causal attention over the last `window` keys, block by block: work and memory grow with t * window, not t^2.

    The row is cut into blocks of at least `window`; a block of queries sees its own keys and the block before.
    Equals `attend` under `causal_mask(t, window, segments)`.
    """
    b, t, h, width = q.shape
    block = max(window, 32)
    blocks = -(-t // block)
    pad = blocks * block - t

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(b, blocks, block, *x.shape[2:])

    def with_previous(x):
        before = jnp.pad(x[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 2))
        return jnp.concatenate([before, x], axis=2)

    behind = jnp.arange(block)[:, None] + block - jnp.arange(2 * block)[None, :]
    real = (jnp.arange(blocks)[:, None, None] > 0) | (jnp.arange(2 * block) >= block)
    mask = (behind >= 0) & (behind < window) & real  # [blocks, block, 2 block]
    mask = jnp.broadcast_to(mask[None], (b, *mask.shape))
    if segments is not None:
        s = cut(segments)
        mask &= s[..., :, None] == with_previous(s)[..., None, :]

    def flat(x):
        return x.reshape(b * blocks, *x.shape[2:])

    y = attend(flat(cut(q)), flat(with_previous(cut(k))), flat(with_previous(cut(v))), flat(mask))
    return y.reshape(b, blocks * block, h, width)[:, :t]


QUERY_TILE, QUERY_BLOCK, KEY_SPANS = 128, 256, 4  # measured on CPU: benchmarks/products
KEY_BLOCK = 1024  # of streamed_attend


def tiled_attend(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    segments: Int[Array, "b t"] | None = None,
    tile: int = QUERY_TILE,
) -> Float[Array, "b t h k"]:
    """Causal attention over the whole row, in tiles of queries that stop at their last key. Equals `attend` under
    `causal_mask(t, 0, segments)`; four tiles skip three eighths of its work, and their scores stay in the cache."""
    return _up_to_the_last_key(_attend_last, tile, q, k, v, segments)


def blocked_attend(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    segments: Int[Array, "b t"] | None = None,
    block: int = QUERY_BLOCK,
) -> Float[Array, "b t h k"]:
    """Causal attention over the whole row, one block of queries at a time, recomputed in the backward pass: memory
    grows with t * block, not t^2. Equals `attend` under `causal_mask(t, 0, segments)`.

    The blocks of each of four parts of the row are one loop over the keys up to that part's end, so that three eighths
    of the scores that the mask would hide are never made."""
    blocks = -(-q.shape[1] // (KEY_SPANS * block))
    return _up_to_the_last_key(partial(_attend_in_blocks, block), blocks * block, q, k, v, segments)


def _up_to_the_last_key(form, span, q, k, v, segments):
    """form(queries, keys, values, segments of the keys) of every `span` queries of a row and the keys up to the last of
    them, side by side."""
    t, parts = q.shape[1], []
    for first in range(0, t, span):
        end = min(first + span, t)
        theirs = None if segments is None else segments[:, :end]
        parts.append(form(q[:, first:end], k[:, :end], v[:, :end], theirs))
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _attend_last(q, k, v, segments):
    """Causal attention of the last queries of a row [b, q, h, k] to all its keys [b, s, g, k]."""
    count, s = q.shape[1], k.shape[1]
    mask = (jnp.arange(s) <= jnp.arange(s - count, s)[:, None])[None]
    if segments is not None:
        mask &= segments[:, s - count :, None] == segments[:, None]
    return attend(q, k, v, mask)


def _attend_in_blocks(block, q, k, v, segments):
    """`_attend_last` in a loop over blocks of queries; the last is filled up, and what fills it is cut off."""
    b, count, h, width = q.shape
    s, blocks = k.shape[1], -(-count // block)
    pad = blocks * block - count
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    own = None if segments is None else jnp.pad(segments[:, s - count :], ((0, 0), (0, pad)), constant_values=-1)

    @jax.checkpoint
    def one(i):
        mask = (jnp.arange(s) <= s - count + i * block + jnp.arange(block)[:, None])[None]
        if own is not None and segments is not None:
            mask &= jax.lax.dynamic_slice_in_dim(own, i * block, block, 1)[:, :, None] == segments[:, None]
        return attend(jax.lax.dynamic_slice_in_dim(q, i * block, block, 1), k, v, mask)

    y = jax.lax.map(one, jnp.arange(blocks))
    return jnp.moveaxis(y, 0, 1).reshape(b, blocks * block, h, width)[:, :count]


def streamed_attend(
    q: Float[Array, "b q h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    own: Int[Array, "b q"],
    segments: Int[Array, "b s"],
    first: Int[Array, ""] | int,
    window: int = 0,
    block: int = QUERY_BLOCK,
    keys: int = KEY_BLOCK,
) -> Float[Array, "b q h k"]:
    """Causal attention of the queries that stand at first, first + 1, ... of a row to its keys, of which they see those
    of their own segment and, with a window, the last ones.

    A block of queries meets a block of keys at a time, and the softmax is kept as its maximum and sum so far (Milakov &
    Gimelshein 2018); all is made again in the backward pass. Memory grows with the row alone.
    """
    b, count, h, width = q.shape
    g, s, kind = k.shape[2], k.shape[1], wide(q.dtype)
    block, keys = min(block, count), min(keys, s)
    shared, blocks = h // g, -(-count // block)

    def cut(x, size, fill=0):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
        return jnp.moveaxis(x.reshape(b, -1, size, *x.shape[2:]), 1, 0)

    place = jnp.arange(-(-s // keys) * keys).reshape(-1, keys)
    every_key = (cut(k, keys), cut(v, keys), cut(segments, keys), place)

    @jax.checkpoint
    def one(now):
        q, own, i = now
        at = first + i * block + jnp.arange(block)[:, None]
        q = jnp.moveaxis(q.reshape(b, block, g, shared, width), 3, 1).reshape(b, shared * block, g, width)

        @jax.checkpoint
        def meet(carry, now):
            top, total, y = carry
            k, v, theirs, place = now
            mask = (place <= at) & (place < s) & ((place > at - window) if window else True)
            mask = mask[None] & (own[:, :, None] == theirs[:, None])
            scores = head_scores(q, k, kind).reshape(b, g, shared, block, keys)
            scores = jnp.where(mask[:, None, None], scores * width**-0.5, jnp.finfo(kind).min)
            higher = jnp.maximum(top, scores.max(-1))
            weights, before = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
            mixed = head_mix(weights.astype(v.dtype).reshape(b, g, shared * block, keys), v)
            mixed = jnp.moveaxis(mixed.reshape(b, shared, block, g, width), 3, 1)
            return (higher, before * total + weights.sum(-1), before[..., None] * y + mixed.astype(kind)), None

        top = jnp.full((b, g, shared, block), jnp.finfo(kind).min, kind)
        start = (top, jnp.zeros_like(top), jnp.zeros((*top.shape, width), kind))
        (_, total, y), _ = jax.lax.scan(meet, start, every_key)
        return jnp.moveaxis(y / total[..., None], 3, 1).reshape(b, block, h, width).astype(v.dtype)

    y = jax.lax.map(one, (cut(q, block), cut(own, block, -1), jnp.arange(blocks)))
    return jnp.moveaxis(y, 0, 1).reshape(b, blocks * block, h, width)[:, :count]


def attend_in_pieces(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    window: int,
    segments: Int[Array, "b t"] | None,
) -> Float[Array, "b t h k"]:
    """Causal attention of rows cut into pieces: a piece asks the one before for what its window reaches, or all of them
    for their keys and values. Equals `attend` under `causal_mask(t, window, segments)`."""
    segments = jnp.zeros(q.shape[:2], jnp.int32) if segments is None else segments

    def piece(split, _):
        q, k, v, segments = split
        if 0 < window <= q.shape[1]:

            def behind(x, first):
                return jnp.concatenate([sequence.from_before(x[:, -window:], first), x], axis=1)

            y = banded_attend(behind(q, 0), behind(k, 0), behind(v, 0), window, behind(segments, -1))
            return y[:, window:], ()
        keys, values, every = (sequence.of_all(x) for x in (k, v, segments))
        return streamed_attend(q, keys, values, segments, every, sequence.number() * q.shape[1], window), ()

    return sequence.over_pieces(piece, (q, k, v, segments))[0]


def full_attend(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    segments: Int[Array, "b t"] | None,
    kernel: str,
) -> Float[Array, "b t h k"]:
    """Causal attention over the whole row, cut at segments, by the kernel asked for (StackConfig.attention).

    `auto` takes cuDNN on a GPU for 16-bit rows without segments (it has no segment mask), else XLA.
    """
    if kernel == "auto":
        fits = q.dtype == jnp.bfloat16 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and segments is None
        fits = fits and platform() == "gpu"
        kernel = "cudnn" if fits else "xla"
    if kernel == "xla" and q.shape[1] > 2 * QUERY_BLOCK:
        return blocked_attend(q, k, v, segments)
    if kernel == "xla":
        return tiled_attend(q, k, v, segments)
    mask = None if segments is None else (segments[:, None, :, None] == segments[:, None, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions (Ainslie et al. 2023; Su et al. 2021), and norms of queries
    and keys in front of the rotation where the config has them."""

    def __init__(self, config: StackConfig, *, std: float, out_std: float, dtype: str, rngs: nnx.Rngs):
        d, width = config.d_model, config.head_width
        self.q = Linear((d,), (config.num_heads, width), std=std, dtype=dtype, rngs=rngs)
        self.k = Linear((d,), (config.kv_heads, width), std=std, dtype=dtype, rngs=rngs)
        self.v = Linear((d,), (config.kv_heads, width), std=std, dtype=dtype, rngs=rngs)
        self.out = Linear((config.num_heads, width), (d,), std=out_std, dtype=dtype, rngs=rngs)
        if config.qk_norm != "none":
            more = dict(over=config.qk_norm, eps=config.norm_eps, dtype=dtype)
            self.q_norm = HeadNorm(config.norm, config.num_heads, width, **more)
            self.k_norm = HeadNorm(config.norm, config.kv_heads, width, **more)
        self.config = config

    def _project(self, x, positions):
        c = self.config
        q, k = self.q(x), self.k(x)
        if c.qk_norm != "none":
            q, k = self.q_norm(q), self.k_norm(k)
        q = shard(rotate(q, positions, c.rotary, c.rope_theta, c.rope_stretch), "batch", "length", "heads", None)
        k = shard(rotate(k, positions, c.rotary, c.rope_theta, c.rope_stretch), "batch", "length", "kv_heads", None)
        return q, k, shard(self.v(x), "batch", "length", "kv_heads", None)

    def __call__(
        self, x: Float[Array, "b t d"], positions: Int[Array, "b t"], segments: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        return self._attend(*self._project(x, positions), segments)

    def _attend(self, q, k, v, segments):
        c, t = self.config, q.shape[1]
        if sequence.pieces() > 1:
            return self.out(attend_in_pieces(q, k, v, c.window, segments))
        if 0 < c.window < t:
            # Below two blocks the band covers the row: the plain form does less work.
            if t > 2 * max(c.window, 32):
                return self.out(banded_attend(q, k, v, c.window, segments))
            return self.out(attend(q, k, v, causal_mask(t, c.window, segments)))
        return self.out(full_attend(q, k, v, segments, c.attention))

    def prefill(
        self, x: Float[Array, "b t d"], lengths: Int[Array, " b"], max_length: int
    ) -> tuple[Float[Array, "b t d"], AttentionCache]:
        """Forward over right-padded rows, and the cache after each row's `lengths` positions."""
        b, t, _ = x.shape
        q, k, v = self._project(x, jnp.broadcast_to(jnp.arange(t), (b, t)))
        slots = self.slots(max_length)
        position = newest_position(lengths - 1, slots)
        index = jnp.clip(position, 0, t - 1)[..., None, None]
        kept = (jnp.swapaxes(jnp.take_along_axis(x, index, 1), 1, 2) for x in (k, v))
        return self._attend(q, k, v, None), AttentionCache(*kept)

    def step(
        self,
        x: Float[Array, "b d"],
        cache: AttentionCache,
        lengths: Int[Array, " b"],
        active: Bool[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b d"], AttentionCache]:
        """One position per row: row i's new position is lengths[i], and the cache holds those before it. Rows that are
        not `active` keep their cache."""
        q, k, v = self._project(x[:, None], lengths[:, None])
        slots = cache.k.shape[2]
        slot = lengths % slots if active is None else jnp.where(active, lengths % slots, slots)
        new = AttentionTrail(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))
        cache = _written(cache, new, slot[:, None])
        y = attend_cached(q, cache, (newest_position(lengths, slots) >= 0)[:, None])
        return self.out(y)[:, 0], cache

    def extend(
        self, x: Float[Array, "b q d"], cache: AttentionCache, lengths: Int[Array, " b"]
    ) -> tuple[Float[Array, "b q d"], AttentionTrail]:
        """Several positions per row, from lengths[i] on, behind those in the cache."""
        count, slots, window = x.shape[1], cache.k.shape[2], self.config.window
        places = lengths[:, None] + jnp.arange(count)
        q, k, v = self._project(x, places)
        before = newest_position(lengths - 1, slots)[:, None]
        old = jnp.broadcast_to(before >= 0, (len(lengths), count, slots))
        if window:
            old &= before > places[:, :, None] - window
        new = jnp.broadcast_to(causal_mask(count, window, None), (len(lengths), count, count))
        mask = jnp.concatenate([old, new], axis=2)
        trail = AttentionTrail(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))
        both = AttentionCache(*(jnp.concatenate(x, axis=2) for x in ((cache.k, trail.k), (cache.v, trail.v))))
        return self.out(attend_cached(q, both, mask)), trail

    def keep(
        self, cache: AttentionCache, trail: AttentionTrail, lengths: Int[Array, " b"], kept: Int[Array, " b"]
    ) -> AttentionCache:
        """The cache with the first `kept` positions of a trail."""
        slots, index = cache.k.shape[2], jnp.arange(trail.k.shape[2])
        written = (index < kept[:, None]) & (index >= kept[:, None] - slots)
        slot = jnp.where(written, (lengths[:, None] + index) % slots, slots)
        return _written(cache, trail, slot)

    def slots(self, max_length: int) -> int:
        """Cache slots needed for rows of up to `max_length` positions: a window keeps a ring of its own size."""
        return min(max_length, self.config.window or max_length)

    def empty_cache(self, b: int, max_length: int) -> AttentionCache:
        shape = (b, self.config.kv_heads, self.slots(max_length), self.config.head_width)
        return AttentionCache(jnp.zeros(shape, self.k.dtype), jnp.zeros(shape, self.v.dtype))


def _written(cache: AttentionCache, new: AttentionTrail, slot: Int[Array, "b q"]) -> AttentionCache:
    """A cache with new keys and values in some slots; none where the slot is past the end.

    Heads count as rows: XLA turns the update of a single row into one that copies the whole cache (seen on CPU)."""

    def put(old, new):
        b, g, s, width = old.shape
        each = jnp.repeat(slot, g, axis=0)
        rows = old.reshape(b * g, s, width)
        rows = rows.at[jnp.arange(b * g)[:, None], each].set(new.reshape(b * g, -1, width), mode="drop")
        return rows.reshape(b, g, s, width)

    return AttentionCache(put(cache.k, new.k), put(cache.v, new.v))


def newest_position(last: Int[Array, " b"], slots: int) -> Int[Array, "b s"]:
    """The newest position that slot j of a ring of `slots` holds once position `last` is written; negative: empty."""
    slot = jnp.arange(slots)
    return slot + slots * ((last[:, None] - slot) // slots)
