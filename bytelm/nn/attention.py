"""Causal grouped-query attention with its weights: over whole rows, and one or a few steps against a cache."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bytelm.config import StackConfig
from bytelm.nn.attend import attend_in_pieces, causal_attend, causal_mask
from bytelm.nn.cache import AttentionCache, AttentionTrail
from bytelm.nn.layers import HeadNorm, Linear, rotate, wide
from bytelm.nn.products import contract
from bytelm.parallel import sequence
from bytelm.parallel.mesh import shard


def attend_cached(q: Float[Array, "b q h k"], cache: AttentionCache, mask: Bool[Array, "#b q s"]) -> Array:
    """`attend` to a cache."""
    b, t, h, width = q.shape
    g, s = cache.k.shape[1:3]
    kind, shared = wide(q.dtype), h // g
    q = jnp.swapaxes(q, 1, 2).reshape(b, g, shared * t, width)
    scores = contract("bgqk,bgsk->bgqs", q, cache.k, kind).reshape(b, g, shared, t, s)
    scores = jnp.where(mask[:, None, None], scores * width**-0.5, jnp.finfo(kind).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(cache.v.dtype)
    y = contract("bgqs,bgsk->bgqk", weights.reshape(b, g, shared * t, s), cache.v)
    return jnp.swapaxes(y.reshape(b, h, t, width), 1, 2)


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
        c = self.config
        if sequence.pieces() > 1:
            return self.out(attend_in_pieces(q, k, v, c.window, segments))
        return self.out(causal_attend(q, k, v, segments, c.window, c.attention))

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
