"""HAT, the hierarchical autoregressive transformer, as released (Neitemeier et al., arXiv 2501.10322 and 2603.15953).

Bytes go through an encoder that looks across words. Each word's bytes are pooled by one learned query into a vector; a
backbone runs over the words. What it says after a word guides the decoder through the bytes of the next one: position t
predicts byte t + 1 and reads the backbone's output for the words before its own.

A word is known to have begun once its first character is whole. `strict` guides change then; `released` ones with the
word's first byte, which the published models were trained with, though a reader of bytes cannot know so early.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bytelm.config import HAT_RESERVED, HATConfig, parse_layout
from bytelm.data.word_rule import CAUSAL_START, START, UNKNOWN_SHIFT
from bytelm.models.base import Output
from bytelm.models.chunking import segment_starts
from bytelm.models.units import Units, make_units, unit_output
from bytelm.models.word_steps import DECIDED, WAITING, WordState, new_words, read_byte, word_marks, words_behind
from bytelm.nn.cache import StackCache
from bytelm.nn.layers import Embedding, HeadNorm, Linear, make_norm, rotate, wide
from bytelm.nn.segment import segment_softmax
from bytelm.nn.stack import SlotGuide, Stack, StepGuide
from bytelm.parallel.mesh import shard
from bytelm.vocab import ByteIds

VOCABULARY = 256


def hat_ids(config: HATConfig) -> ByteIds:
    """How HAT numbers bytes."""
    return ByteIds(start=config.start, end=192, reserved=bytes(HAT_RESERVED))


def repeat_heads(x: Float[Array, "*b g k"], heads: int) -> Float[Array, "*b h k"]:
    """Heads that several others share, once for each of them."""
    return jnp.repeat(x, heads // x.shape[-2], axis=-2)


class WordPooling(nnx.Module):
    """One learned query per word attends to the word's own bytes; rotary phases are word number - byte number."""

    def __init__(self, c: HATConfig, *, rngs: nnx.Rngs):
        d, wider = c.encoder.d_model, c.backbone.d_model
        heads, kv, width = c.pool_heads, c.pool_kv_heads or c.pool_heads, c.backbone.d_model // c.pool_heads
        more = dict(std=c.init_std, dtype=c.dtype, rngs=rngs)
        self.query = nnx.Param(jax.random.normal(rngs.params(), (wider,), jnp.float32) * (c.init_std or wider**-0.5))
        self.q = Linear((wider,), (heads, width), **more)
        self.k, self.v = Linear((d,), (kv, width), **more), Linear((d,), (kv, width), **more)
        self.out = Linear((heads, width), (wider,), **more)
        if c.pool_norm != "none":
            norm = dict(over=c.pool_norm, eps=c.encoder.norm_eps, dtype=c.dtype)
            self.q_norm, self.k_norm = HeadNorm("rms", heads, width, **norm), HeadNorm("rms", kv, width, **norm)
        self.config = c

    def keys(self, h: Float[Array, "*b d"]) -> tuple[Array, Array]:
        """Keys (not turned) and values of bytes, a pair for each query head."""
        keys = self.k(h)
        if self.config.pool_norm != "none":
            keys = self.k_norm(keys)
        return repeat_heads(keys, self.config.pool_heads), repeat_heads(self.v(h), self.config.pool_heads)

    def scores(self, keys: Float[Array, "b t h k"], phase: Int[Array, "b t"]) -> Float[Array, "b t h"]:
        """q . k of bytes whose number is `phase` above that of their word: turning the key by the difference is turning
        both by their own."""
        kind = wide(keys.dtype)
        query = self.q(self.query[...])
        query = (query if self.config.pool_norm == "none" else self.q_norm(query)).astype(kind)
        c = self.config
        turned = rotate(keys, phase, keys.shape[-1], c.pool_theta, c.pool_stretch).astype(kind)
        return jnp.sum(turned * query, axis=-1) * keys.shape[-1] ** -0.5

    def __call__(self, h: Float[Array, "b t d"], units: Units) -> Float[Array, "b c e"]:
        keys, values = self.keys(h)
        scores = self.scores(keys, units.place - units.index)
        pooled = segment_softmax(scores, values, units.number, units.slots)
        return self.out(pooled.astype(h.dtype))


class GuideLayers(nnx.Module):
    """What each decoder layer adds of a guide: out(v(norm(guide))). Weights are stacked [l, ...].

    In the published code this is an attention over one key, whose query, key and softmax cannot change anything."""

    def __init__(self, c: HATConfig, layers: int, *, rngs: nnx.Rngs):
        d, wider = c.decoder.d_model, c.backbone.d_model
        heads, kv = c.guide_heads, c.guide_kv_heads or c.guide_heads

        def make(key):
            more = dict(std=c.init_std, dtype=c.dtype, rngs=nnx.Rngs(params=key))
            return OneGuide(c, Linear((wider,), (kv, d // heads), **more), Linear((heads, d // heads), (d,), **more))

        self.layer = jax.vmap(make)(jax.random.split(rngs.params(), layers))

    def __call__(self, guide: Float[Array, "*b e"]) -> Float[Array, "l *b d"]:
        _, out = jax.lax.scan(lambda _, layer: (None, layer(guide)), None, self.layer)
        return out


class OneGuide(nnx.Module):
    """One layer of `GuideLayers`."""

    def __init__(self, c: HATConfig, v: Linear, out: Linear):
        self.norm = make_norm("rms", c.backbone.d_model, eps=c.decoder.norm_eps, dtype=c.dtype)
        self.v, self.out = v, out

    def __call__(self, guide: Float[Array, "*b e"]) -> Float[Array, "*b d"]:
        return self.out(repeat_heads(self.v(self.norm(guide)), self.out.kernel.shape[0]))


@jax.tree_util.register_dataclass
@dataclass
class PoolState:
    """The softmax over the bytes of a word so far: largest score, sum of weights, weighted sum of values."""

    top: Float[Array, "b h"]
    mass: Float[Array, "b h"]
    total: Float[Array, "b h k"]

    def add(self, score: Float[Array, "b h"], value: Float[Array, "b h k"], rows: Bool[Array, " b"]) -> "PoolState":
        """With one more byte in some rows."""
        score = jnp.where(rows[:, None], score.astype(self.top.dtype), -jnp.inf)
        top = jnp.maximum(self.top, score)
        finite = jnp.where(jnp.isfinite(top), top, 0)
        old, new = jnp.exp(self.top - finite), jnp.exp(score - finite)
        total = old[..., None] * self.total + new[..., None] * jnp.where(rows[:, None, None], value, 0)
        return PoolState(top, old * self.mass + new, total)


@jax.tree_util.register_dataclass
@dataclass
class HATCache:
    """What decoding keeps: the caches of the three stacks, the word so far, bytes that wait, the guide of now."""

    encoder: StackCache
    decoder: StackCache
    backbone: StackCache
    words: WordState
    index: Int[Array, " b"]  # of the word so far; -1 before the first
    pool: PoolState
    keys: Float[Array, "b n h k"]  # of bytes that wait, oldest first
    values: Float[Array, "b n h k"]
    guide: Float[Array, "b e"]


class HAT(nnx.Module):
    """Byte encoder, word pooling, backbone, guided byte decoder, head."""

    def __init__(self, config: HATConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.ids = hat_ids(c)
        more = dict(std=c.init_std, dtype=c.dtype, rngs=rngs)
        self.embed = Embedding(VOCABULARY, c.encoder.d_model, **more)
        self.encoder = Stack(c.encoder, closing_norm=False, **more)
        self.pool = WordPooling(c, rngs=rngs)
        self.backbone = Stack(c.backbone, closing_norm=False, **more)
        first = jax.random.normal(rngs.params(), (c.backbone.d_model,), jnp.float32)
        self.first_word = nnx.Param(first * (c.init_std or 1))
        self.guide = GuideLayers(c, self.guided_layers, rngs=rngs)
        self.decoder = Stack(c.decoder, **more)
        self.head = Linear((c.decoder.d_model,), (VOCABULARY,), **more, widen=True)

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return sum(count for _, count in parse_layout(self.config.decoder.layout))

    @property
    def guided_layers(self) -> int:
        return self.layers if self.config.guide_every_layer else 1

    def _guides(self, guide: Float[Array, "*b e"]) -> Float[Array, "l *b d"]:
        """What each decoder layer adds; nothing behind the guided ones."""
        some = self.guide(guide.astype(self.config.dtype))
        return jnp.pad(some, ((0, self.layers - self.guided_layers), *((0, 0),) * (some.ndim - 1)))

    def _marks(self, inputs, segments, marks) -> tuple[Array, Array]:
        """Where words begin, and how many of them a reader of each byte cannot know of yet."""
        if marks is None:
            begins, known = word_marks(
                inputs, segment_starts(segments, *inputs.shape), self.config.rule, self.config.max_word
            )
            return begins, jnp.cumsum(begins, axis=1) - jnp.cumsum(known, axis=1)
        if self.config.guide == "released":
            return (marks & START) > 0, jnp.zeros_like(marks)
        return (marks & CAUSAL_START) > 0, marks >> UNKNOWN_SHIFT

    def _units(self, inputs, segments, marks, slots: int | None) -> tuple[Units, Int[Array, "b t"]]:
        """The words of rows, and the number of the word that each position's guide is that of."""
        begins, unknown = self._marks(inputs, segments, marks)
        units = make_units(begins, segments, slots)
        return units, units.number - jnp.minimum(unknown, units.index)

    def _guide(self, o, units: Units, reads, segments) -> SlotGuide:
        """Guides of all decoder layers. The guide of word i is the output for word i - 1; of a document's first word,
        and where that output has no slot and the last slot is another document's, the learned one."""
        slot = jnp.minimum(reads - 1, units.slots - 1)
        if units.document is not None:
            there = jnp.take_along_axis(units.document, jnp.maximum(slot, 0), axis=1)
            slot = jnp.where(there == segments, slot, -1)
        return SlotGuide(self._guides(o), self._guides(self.first_word[...]), slot)

    def __call__(
        self,
        inputs: Int[Array, "b t"],
        segments: Int[Array, "b t"] | None = None,
        capacity: tuple[int, ...] | None = None,
        marks: Int[Array, "b t"] | None = None,
    ) -> Output:
        """Logits of the next id after each input, and the level of words.

        `marks` says where words begin (`data.words.marks`) and is read as `config.guide` says; without, the words are
        found here, byte by byte, and the guides are strict. Targets of positions that `Output.scored` leaves out
        belong to words without a slot.
        """
        units, reads = self._units(inputs, segments, marks, None if capacity is None else capacity[0])
        h = self.encoder(self.embed(inputs), segments=segments)
        e = shard(self.pool(h, units), "batch", None, None)
        o = self.backbone(e, segments=units.document)
        y = self.decoder(h, segments=segments, guide=self._guide(o, units, reads, segments))
        return unit_output(self.head(y), units, inputs, segments, limited=capacity is not None)

    def words(self, inputs: Int[Array, "b t"]) -> tuple[Float[Array, "b c e"], Units]:
        """What goes into the backbone, and the words that it is of."""
        units, _ = self._units(inputs, None, None, None)
        return self.pool(self.encoder(self.embed(inputs)), units), units

    def prefill(
        self, inputs: Int[Array, "b t"], lengths: Int[Array, " b"], max_length: int
    ) -> tuple[Float[Array, "b v"], HATCache]:
        """Logits after each row's last input and the cache behind it; rows are right-padded, lengths at least 1."""
        b, t = inputs.shape
        units, reads = self._units(inputs, None, None, None)
        rows, last = jnp.arange(b), lengths - 1

        words = words_behind(inputs, lengths, self.config.rule, self.config.max_word)
        h, encoder = self.encoder.prefill(self.embed(inputs), lengths, max_length)
        index = jnp.where(words.waiting == lengths, -1, reads[rows, last])  # of the word that each row is in
        o, backbone = self.backbone.prefill(self.pool(h, units), jnp.maximum(index, 0), max_length)
        guide = self._guide(o, units, reads, None)
        y, decoder = self.decoder.prefill(h, lengths, max_length, guide)
        now = jnp.where((index > 0)[:, None], o[rows, jnp.maximum(index - 1, 0)], self.first_word[...].astype(o.dtype))

        keys, values = self.pool.keys(h)
        position = jnp.arange(t)
        mine = (units.number == index[:, None]) & (position < (lengths - words.waiting)[:, None])
        scores = jnp.where(mine[..., None], self.pool.scores(keys, units.place - units.index), -jnp.inf)
        top = jnp.max(scores, axis=1)
        weight = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0)[:, None])
        pool = PoolState(top, weight.sum(axis=1), jnp.einsum("bth,bthk->bhk", weight, values.astype(weight.dtype)))
        tail = jnp.clip(lengths[:, None] - words.waiting[:, None] + jnp.arange(WAITING), 0, t - 1)[..., None, None]
        cache = HATCache(
            encoder, decoder, backbone, words, index, pool, jnp.take_along_axis(keys, tail, 1),
            jnp.take_along_axis(values, tail, 1), now,
        )  # fmt: skip
        return self.head(y[rows, last]), cache

    def step(self, inputs: Int[Array, " b"], cache: HATCache) -> tuple[Float[Array, "b v"], HATCache]:
        """Logits after one more input per row. The backbone runs for rows in which a word has ended."""
        c = self.config
        position = cache.encoder.lengths
        h, encoder = self.encoder.step(self.embed(inputs), cache.encoder)
        key, value = self.pool.keys(h)
        words, decided, starts = read_byte(cache.words, inputs, c.rule, c.max_word)
        rows, waited = jnp.arange(inputs.shape[0]), cache.words.waiting
        keys, values = (
            jnp.pad(old, ((0, 0), (0, 1), (0, 0), (0, 0))).at[rows, waited].set(new)
            for old, new in ((cache.keys, key), (cache.values, value))
        )

        def one(carry, n):
            """Over the n-th byte decided over: ends a word, begins one, or adds to it."""
            index, pool, backbone, guide = carry
            here = n < decided
            begins = here & starts[:, n]
            ended = begins & (index >= 0)

            def run(carry):
                backbone, guide = carry
                word = pool.total / jnp.where(pool.mass > 0, pool.mass, 1)[..., None]
                o, backbone = self.backbone.step(self.pool.out(word.astype(c.dtype)), backbone, ended)
                return backbone, jnp.where(ended[:, None], o, guide)

            backbone, guide = jax.lax.cond(jnp.any(ended), run, lambda carry: carry, (backbone, guide))
            index = index + begins
            empty = PoolState(jnp.full_like(pool.top, -jnp.inf), jnp.zeros_like(pool.mass), jnp.zeros_like(pool.total))
            pool = jax.tree.map(lambda a, b: jnp.where(begins.reshape(-1, *(1,) * (a.ndim - 1)), a, b), empty, pool)
            place = position - waited + n
            score = self.pool.scores(keys[:, n][:, None], (place - index)[:, None])[:, 0]
            return (index, pool.add(score, values[:, n], here), backbone, guide), None

        carry = (cache.index, cache.pool, cache.backbone, cache.guide)
        (index, pool, backbone, guide), _ = jax.lax.scan(one, carry, jnp.arange(DECIDED))
        y, decoder = self.decoder.step(h, cache.decoder, guide=StepGuide(self._guides(guide)))
        # What still waits: the new byte alone behind bytes that were none, or all that waited and the new one.
        from_ = jnp.minimum(waited + 1 - words.waiting, WAITING)[:, None] + jnp.arange(WAITING)
        from_ = jnp.minimum(from_, WAITING)[..., None, None]
        keys, values = jnp.take_along_axis(keys, from_, axis=1), jnp.take_along_axis(values, from_, axis=1)
        return self.head(y), HATCache(encoder, decoder, backbone, words, index, pool, keys, values, guide)

    def empty_cache(self, b: int, max_length: int) -> Any:
        """The cache of rows that have seen nothing yet."""
        c = self.config
        heads, width, kind = c.pool_heads, c.backbone.d_model // c.pool_heads, wide(jnp.dtype(c.dtype))
        pool = PoolState(
            jnp.full((b, heads), -jnp.inf, kind), jnp.zeros((b, heads), kind), jnp.zeros((b, heads, width), kind)
        )
        held = jnp.zeros((b, WAITING, heads, width), c.dtype)
        first = jnp.broadcast_to(self.first_word[...].astype(c.dtype), (b, c.backbone.d_model))
        return HATCache(
            self.encoder.empty_cache(b, max_length), self.decoder.empty_cache(b, max_length),
            self.backbone.empty_cache(b, max_length), new_words(b), jnp.full(b, -1, jnp.int32), pool, held, held, first,
        )  # fmt: skip
