"""Causal attention of whole rows: forms that do less work or need less memory, all equal to `attend` under
`causal_mask`. Pure functions, no weights."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bytelm.nn.layers import wide
from bytelm.nn.products import head_mix, head_scores
from bytelm.nn.ring import ring_attend
from bytelm.nn.splash import splash_attend
from bytelm.parallel import sequence
from bytelm.parallel.mesh import platform


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
KEY_BLOCK = 1024  # of rows in pieces
SPLASH_FROM = 512  # positions of a row: a whole block of the kernel


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


def attend_in_pieces(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    window: int,
    segments: Int[Array, "b t"] | None,
    block: int = QUERY_BLOCK,
    keys: int = KEY_BLOCK,
) -> Float[Array, "b t h k"]:
    """Causal attention of rows cut into pieces: a piece asks the one before for what its window reaches, or meets the
    keys of all pieces, as they go round, in blocks. Equals `attend` under `causal_mask(t, window, segments)`."""
    segments = jnp.zeros(q.shape[:2], jnp.int32) if segments is None else segments

    def piece(split, _):
        q, k, v, segments = split
        if 0 < window <= q.shape[1]:

            def behind(x, first):
                return jnp.concatenate([sequence.from_before(x[:, -window:], first), x], axis=1)

            y = banded_attend(behind(q, 0), behind(k, 0), behind(v, 0), window, behind(segments, -1))
            return y[:, window:], ()
        return ring_attend(q, k, v, segments, window, block, keys), ()

    return sequence.over_pieces(piece, (q, k, v, segments))[0]


def causal_attend(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    segments: Int[Array, "b t"] | None,
    window: int,
    kernel: str,
) -> Float[Array, "b t h k"]:
    """Causal attention over the whole row, or its last `window` keys, cut at segments, by the kernel asked for
    (StackConfig.attention). Equals `attend` under `causal_mask(t, window, segments)`.

    `auto` is for 16-bit numbers splash on TPU (from rows of SPLASH_FROM on) and cuDNN on GPU (whole rows without
    segments: it has no segment mask), else XLA. Windows are XLA's with `cudnn`, too.
    """
    t, width = q.shape[1], q.shape[-1]
    window = window if window < t else 0
    if kernel == "auto":
        kernel, here = "xla", platform() if q.dtype == jnp.bfloat16 else ""
        if here == "tpu" and t >= SPLASH_FROM:
            kernel = "splash"
        elif here == "gpu" and width % 8 == 0 and width <= 128 and segments is None:
            kernel = "cudnn"
    if kernel == "splash":
        return splash_attend(q, k, v, segments, window)
    if window:  # below two blocks the band covers the row: the plain form does less work
        if t > 2 * max(window, 32):
            return banded_attend(q, k, v, window, segments)
        return attend(q, k, v, causal_mask(t, window, segments))
    if kernel == "cudnn":
        mask = None if segments is None else (segments[:, None, :, None] == segments[:, None, None, :])
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")
    if t > 2 * QUERY_BLOCK:
        return blocked_attend(q, k, v, segments)
    return tiled_attend(q, k, v, segments)
