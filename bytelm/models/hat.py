"""HAT, the hierarchical autoregressive transformer, as released (Neitemeier et al., arXiv 2501.10322 and 2603.15953).

Bytes go through an encoder that looks across words. Each word's bytes are pooled by one learned query into a vector; a
backbone runs over the words. What it says after a word guides the decoder through the bytes of the next one: position t
predicts byte t + 1 and reads the backbone's output for the words before its own.

A word is known to have begun once its first character is whole. `strict` guides change then; `released` ones with the
word's first byte, which the published models were trained with, though a reader of bytes cannot know so early.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bytelm.config import HAT_RESERVED, HATConfig, parse_layout
from bytelm.data.word_rule import CAUSAL_START, START, UNKNOWN_SHIFT
from bytelm.models.base import Output
from bytelm.models.chunking import segment_starts
from bytelm.models.units import Units, make_units, unit_output
from bytelm.models.word_pooling import GuideLayers, PoolState, WordPooling, pool_state
from bytelm.models.word_steps import (
    DECIDED,
    WAITING,
    WordState,
    WordTrail,
    new_words,
    read_byte,
    read_bytes,
    word_marks,
    words_behind,
)
from bytelm.nn.cache import StackCache, if_needed, keep_some, newest, pick
from bytelm.nn.layers import Embedding, Linear, wide
from bytelm.nn.segment import segment_softmax
from bytelm.nn.stack import SlotGuide, Stack, StepGuide
from bytelm.parallel.mesh import shard
from bytelm.vocab import ByteIds

VOCABULARY = 256


def hat_ids(config: HATConfig) -> ByteIds:
    """How HAT numbers bytes."""
    return ByteIds(start=config.start, end=192, reserved=bytes(HAT_RESERVED))


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


@jax.tree_util.register_dataclass
@dataclass
class HATTrail:
    """Of several inputs that a network has read and may keep. Elements are the bytes that waited before, then the
    inputs; in front of the scores and values stands the word so far."""

    encoder: Any
    decoder: Any
    backbone: Any
    words: WordTrail
    keys: Float[Array, "b s h k"]
    values: Float[Array, "b n h k"]
    scores: Float[Array, "b n h"]
    number: Int[Array, "b n"]  # of each element's word; 0 is the word so far
    ended: Int[Array, "b q"]  # how many words have ended with each input
    guides: Float[Array, "b c e"]  # that of now, then those behind the words that end


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
        pool = pool_state(self.pool.scores(keys, units.place - units.index), values, mine)
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
                o, backbone = self.backbone.step(self.pool.out(pool.mean.astype(c.dtype)), backbone, ended)
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

    def alone(self, inputs: Int[Array, " b"], cache: HATCache) -> tuple[Float[Array, "b v"], HATCache]:
        """A step that looks for no words and does not run the backbone: a guess."""
        h, encoder = self.encoder.step(self.embed(inputs), cache.encoder)
        y, decoder = self.decoder.step(h, cache.decoder, guide=StepGuide(self._guides(cache.guide)))
        return self.head(y), replace(cache, encoder=encoder, decoder=decoder)

    def extend(
        self, inputs: Int[Array, "b q"], cache: HATCache
    ) -> tuple[Float[Array, "b q v"], HATTrail, Float[Array, "b q d"]]:
        """After each of several more inputs per row: logits, the trail that `keep` reads, what the logits are made of.
        The backbone reads all words that end in them at once."""
        c, (b, q) = self.config, inputs.shape
        rows, waited = jnp.arange(b)[:, None], cache.words.waiting[:, None]
        h, encoder = self.encoder.extend(self.embed(inputs), cache.encoder)
        keys, values = (
            jnp.pad(old, ((0, 0), (0, q), (0, 0), (0, 0))).at[rows, waited + jnp.arange(q)].set(new)
            for old, new in zip((cache.keys, cache.values), self.pool.keys(h))
        )
        words = read_bytes(cache.words, inputs, c.rule, c.max_word)
        number = jnp.cumsum(words.begins, axis=1)
        place = cache.encoder.lengths[:, None] - waited + jnp.arange(WAITING + q)
        scores = self.pool.scores(keys, place - cache.index[:, None] - number)
        score, value = cache.pool.as_byte()
        scores = jnp.concatenate([score[:, None], scores], axis=1)
        values = jnp.concatenate([value[:, None], values.astype(value.dtype)], axis=1)
        number = jnp.pad(number, ((0, 0), (1, 0)))

        some = (cache.index >= 0)[:, None]  # else the first word of a row is yet to begin, and nothing ends there
        ended = jnp.where(some, words.known, jnp.maximum(words.known - 1, 0))

        def run():
            pooled = segment_softmax(scores, values, jnp.where(some, number, number - 1), WAITING + q)
            return self.backbone.extend(self.pool.out(pooled.astype(c.dtype)), cache.backbone)

        o, backbone = if_needed(jnp.any(ended > 0), run)
        guides = jnp.concatenate([cache.guide[:, None], o], axis=1)
        every = self._guides(guides)
        y, decoder = self.decoder.extend(h, cache.decoder, SlotGuide(every, every[:, 0, 0], ended))
        trail = HATTrail(encoder, decoder, backbone, words, keys, values, scores, number, ended, guides)
        return self.head(y), trail, y

    def keep(self, cache: HATCache, trail: HATTrail, kept: Int[Array, " b"]) -> HATCache:
        """The cache after the first `kept` inputs of a trail."""
        zero = jnp.zeros_like(kept)
        known, ended = newest(trail.words.known, kept, zero), newest(trail.ended, kept, zero)
        decided = newest(trail.words.decided, kept, zero)
        element = jnp.arange(trail.number.shape[1])  # 0: the word so far
        pool = pool_state(trail.scores, trail.values, (trail.number == known[:, None]) & (element <= decided[:, None]))
        tail = jnp.minimum(decided[:, None] + jnp.arange(WAITING), trail.keys.shape[1] - 1)[..., None, None]
        keys, values = jnp.take_along_axis(trail.keys, tail, 1), jnp.take_along_axis(trail.values[:, 1:], tail, 1)
        words = jax.tree.map(lambda new, old: newest(new, kept, old), trail.words.states, cache.words)
        return HATCache(
            self.encoder.keep(cache.encoder, trail.encoder, kept),
            self.decoder.keep(cache.decoder, trail.decoder, kept),
            keep_some(self.backbone, cache.backbone, trail.backbone, ended), words, cache.index + known, pool, keys,
            values.astype(cache.values.dtype), pick(trail.guides, ended),
        )  # fmt: skip

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
