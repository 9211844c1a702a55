"""BLT, the byte latent transformer (Pagnoni et al. 2024, arXiv 2412.09871).

Bytes, with embeddings of hashes of the last few of them, go through a local encoder. Several queries per patch, made of
the largest of each feature over the patch's bytes, attend to those bytes; a global stack runs over the patches. In
front of each block of the local decoder a byte reads the newest whole patch: at a patch's last byte that is its own.

Where patches begin is known one byte ahead (`models/patcher.py`): in training from marks that were made before, else
from the entropy model that is part of the network.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bytelm.config import BLTConfig, parse_layout
from bytelm.models.base import Output
from bytelm.models.chunking import segment_starts
from bytelm.models.patch_attention import CrossAttention, PatchGuide, PatchPooling, PatchSlots, PatchStep
from bytelm.models.patcher import Patcher, PatchState, PatchTrail, begins_of, flat_ids
from bytelm.models.units import Units, make_units, unit_output
from bytelm.nn.cache import StackCache, if_needed, keep_some, newest
from bytelm.nn.compaction import compact, slot_positions
from bytelm.nn.hashing import PRIMES, ngram_hashes
from bytelm.nn.layers import Embedding, Linear, wide
from bytelm.nn.stack import Stack
from bytelm.parallel.mesh import shard
from bytelm.vocab import BLT_IDS

VOCABULARY = 260


@jax.tree_util.register_dataclass
@dataclass
class BLTCache:
    """What decoding keeps: the caches of the stacks, the patch so far, and what bytes read of the newest whole one."""

    encoder: StackCache
    main: StackCache
    decoder: StackCache
    recent: Int[Array, "b n"]  # the last ids, newest last, 0 before the start
    patch: PatchState
    begin: Int[Array, " b"]  # position of the first byte of the patch so far
    top: Float[Array, "b d"]  # its largest features
    keys: Float[Array, "b s g k"]  # of bytes, by position
    values: Float[Array, "b s g k"]
    read: tuple[Array, Array] = field(default_factory=tuple)  # keys and values for each decoder layer: l b q h k


@jax.tree_util.register_dataclass
@dataclass
class BLTTrail:
    """Of several inputs that a network has read and may keep."""

    encoder: Any
    main: Any
    decoder: Any
    ids: Int[Array, "b s"]  # those of now behind the last ones before
    patch: PatchTrail
    begin: Int[Array, "b q"]  # of the patch that each is in
    top: Float[Array, "b q d"]
    keys: Float[Array, "b q g k"]
    values: Float[Array, "b q g k"]
    read: tuple[Array, Array]  # of patches, the newest whole one before all others: l b c q h k


class BLT(nnx.Module):
    """Embeddings, encoder, patch pooling, global stack, decoder that reads patches, head; and the patcher."""

    ids = BLT_IDS

    def __init__(self, config: BLTConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        more = dict(std=c.init_std, dtype=c.dtype, rngs=rngs)
        d, wider = c.encoder.d_model, c.main.d_model
        self.embed = Embedding(VOCABULARY, d, **more)
        if c.ngrams:
            self.hash_embed = Embedding(len(c.ngrams) * c.hash_functions * c.hash_size, d, split=True, **more)
        self.encoder = Stack(c.encoder, closing_norm=False, **more)
        self.pool = PatchPooling(c, rngs=rngs)
        if c.queries * d != wider:
            self.join = Linear((c.queries, d), (wider,), **more)
        self.main = Stack(c.main, closing_norm=False, **more)
        self.part = Linear((wider,), (c.queries, d), **more)
        keys = jax.random.split(rngs.params(), self._reading_layers)
        make = lambda key: CrossAttention(  # noqa: E731
            c.decoder, std=c.init_std, doubled=c.doubled, dtype=c.dtype, rngs=nnx.Rngs(params=key)
        )
        self.read = jax.vmap(make)(keys)
        self.decoder = Stack(c.decoder, **more)
        self.head = Linear((d,), (VOCABULARY,), **more, widen=True)
        self.patcher = Patcher(c.patcher, rngs=rngs)

    @property
    def _reading_layers(self) -> int:
        """Decoder layers that read patches."""
        return sum(n for _, n in parse_layout(self.config.decoder.layout)) if self.config.read_every_layer else 1

    @property
    def _longest_group(self) -> int:
        return max(self.config.ngrams, default=1)

    def _enter(self, inputs: Int[Array, "*b"], recent: Int[Array, "*b n"]) -> Float[Array, "*b d"]:
        """Embeddings of bytes and of the groups that end with them; `recent`: the last ids, this one the last."""
        c, x = self.config, self.embed(inputs)
        if not c.ngrams:
            return x
        kinds = ((function, n) for function in range(c.hash_functions) for n in c.ngrams)
        for i, (function, n) in enumerate(kinds):
            x += self.hash_embed(ngram_hashes(recent[..., -n:], PRIMES[function], c.hash_size) + i * c.hash_size)
        return x

    def _recent(self, inputs: Int[Array, "b t"], place: Int[Array, "b t"]) -> Int[Array, "b t n"]:
        """The last ids at each position, 0 before the document."""
        n = self._longest_group
        shifted = [jnp.pad(inputs, ((0, 0), (back, 0)))[:, : inputs.shape[1]] for back in range(n - 1, -1, -1)]
        back = jnp.arange(n - 1, -1, -1)
        return jnp.where(back <= place[..., None], jnp.stack(shifted, axis=-1), 0)

    def _widen(self, patches: Float[Array, "*b q d"]) -> Float[Array, "*b e"]:
        return self.join(patches) if hasattr(self, "join") else patches.reshape(*patches.shape[:-2], -1)

    def _decode(self, run, h, guide: Any):
        """The decoder's output: `run` is its forward pass, prefill or step."""
        if self.config.read_every_layer:
            return run(h, guide=guide)
        r = h.astype(wide(h.dtype))
        return run(guide.enter(r, jax.tree.map(lambda x: x[0], guide.at_layers(0, 1))))

    def _slots(self, units: Units, fires) -> Int[Array, "b t"]:
        """Slot of the newest whole patch at each position."""
        return jnp.clip(units.number - 1 + fires, 0, units.slots - 1)

    def __call__(
        self,
        inputs: Int[Array, "b t"],
        segments: Int[Array, "b t"] | None = None,
        capacity: tuple[int, ...] | None = None,
        marks: Int[Array, "b t"] | None = None,
    ) -> Output:
        """Logits of the next id after each input, and the level of patches.

        `marks` is above 0 at positions behind which a patch begins; without, the patcher says so. Targets of positions
        that `Output.scored` leaves out belong to patches without a slot.
        """
        starts = segment_starts(segments, *inputs.shape)
        fires = self.patcher.fires(flat_ids(inputs, self.ids), segments) if marks is None else (marks > 0) | starts
        units = make_units(begins_of(fires, starts), segments, None if capacity is None else capacity[0])
        h = self.encoder(self._enter(inputs, self._recent(inputs, units.place)), segments=segments)
        patches = shard(self._widen(self.pool(h, units)), "batch", None, None)
        o = self.main(patches, segments=units.document)
        guide = PatchGuide(self.read, self.part(o), self._slots(units, fires))

        def run(x, guide=None):
            return self.decoder(x, segments=segments, guide=guide)

        logits = self.head(self._decode(run, h, guide))
        return unit_output(logits, units, inputs - self.ids.offset, segments, limited=capacity is not None)

    def prefill(
        self, inputs: Int[Array, "b t"], lengths: Int[Array, " b"], max_length: int
    ) -> tuple[Float[Array, "b v"], BLTCache]:
        """Logits after each row's last input and the cache behind it; rows are right-padded, lengths at least 1."""
        b, t = inputs.shape
        patch, fires = self.patcher.behind(flat_ids(inputs, self.ids), lengths, max_length)
        units = make_units(begins_of(fires, segment_starts(None, b, t)), None, None)
        rows, last = jnp.arange(b), lengths - 1
        recent = self._recent(inputs, units.place)
        h, encoder = self.encoder.prefill(self._enter(inputs, recent), lengths, max_length)
        whole = self._slots(units, fires)[rows, last]  # the newest whole patch
        o, main = self.main.prefill(self._widen(self.pool(h, units)), whole + 1, max_length)
        parts = self.part(o)
        guide = PatchGuide(self.read, parts, self._slots(units, fires))

        def run(x, guide=None):
            return self.decoder.prefill(x, lengths, max_length, guide)

        y, decoder = self._decode(run, h, guide)
        number = units.number[rows, last]
        mine = (units.number == number[:, None]) & (jnp.arange(t) < lengths[:, None])
        top = jnp.where(mine[..., None], h, -jnp.inf).max(axis=1)
        room = ((0, 0), (0, max(max_length - t, 0)), (0, 0), (0, 0))
        keys, values = (jnp.pad(x, room) for x in self.pool.cross.shared_keys(h))
        cache = BLTCache(
            encoder, main, decoder, recent[rows, last], patch,
            units.first[rows, number], top, keys, values, self._layer_keys(parts[rows, whole]),
        )  # fmt: skip
        return self.head(y[rows, last]), cache

    def _layer_keys(self, patch: Float[Array, "*b q d"]) -> tuple[Array, Array]:
        """Keys and values of patches for each decoder layer that reads them."""
        return jax.vmap(lambda cross: cross.keys(patch))(self.read)

    def step(self, inputs: Int[Array, " b"], cache: BLTCache) -> tuple[Float[Array, "b v"], BLTCache]:
        """Logits after one more input per row. The global stack runs for rows in which a patch ends with it."""
        position = cache.encoder.lengths
        recent = jnp.concatenate([cache.recent[:, 1:], inputs[:, None]], axis=1)
        h, encoder = self.encoder.step(self._enter(inputs, recent), cache.encoder)
        begins = cache.patch.next
        top = jnp.where(begins[:, None], h, jnp.maximum(cache.top, h))
        begin = jnp.where(begins, position, cache.begin)
        rows = jnp.arange(len(inputs))
        keys, values = (
            old.at[rows, position].set(new, mode="drop")
            for old, new in zip((cache.keys, cache.values), self.pool.cross.shared_keys(h))
        )
        patch = self.patcher.read(flat_ids(inputs, self.ids), cache.patch)

        def run(carry):
            main, read = carry
            index = jnp.arange(keys.shape[1])
            mine = (index >= begin[:, None]) & (index <= position[:, None])
            o, main = self.main.step(self._widen(self.pool.one(top, keys, values, mine)), main, patch.next)
            new = self._layer_keys(self.part(o))
            keep = patch.next[None, :, None, None, None]
            return main, jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, read)

        main, read = jax.lax.cond(jnp.any(patch.next), run, lambda carry: carry, (cache.main, cache.read))
        guide = PatchStep(self.read, *read)
        y, decoder = self._decode(lambda x, guide=None: self.decoder.step(x, cache.decoder, guide=guide), h, guide)
        return self.head(y), BLTCache(encoder, main, decoder, recent, patch, begin, top, keys, values, read)

    def alone(self, inputs: Int[Array, " b"], cache: BLTCache) -> tuple[Float[Array, "b v"], BLTCache]:
        """A step that neither asks where patches begin nor runs the global stack: a guess."""
        recent = jnp.concatenate([cache.recent[:, 1:], inputs[:, None]], axis=1)
        h, encoder = self.encoder.step(self._enter(inputs, recent), cache.encoder)
        guide = PatchStep(self.read, *cache.read)
        y, decoder = self._decode(lambda x, guide=None: self.decoder.step(x, cache.decoder, guide=guide), h, guide)
        return self.head(y), replace(cache, encoder=encoder, decoder=decoder, recent=recent)

    def extend(
        self, inputs: Int[Array, "b q"], cache: BLTCache
    ) -> tuple[Float[Array, "b q v"], BLTTrail, Float[Array, "b q d"]]:
        """After each of several more inputs per row: logits, the trail that `keep` reads, what the logits are made of.
        The global stack reads all patches that end in them at once."""
        (b, q), n = inputs.shape, self._longest_group
        place = cache.encoder.lengths[:, None] + jnp.arange(q)
        ids = jnp.concatenate([cache.recent, inputs], axis=1)
        recent = ids[:, jnp.arange(q)[:, None] + 1 + jnp.arange(n)]
        h, encoder = self.encoder.extend(self._enter(inputs, recent), cache.encoder)
        patch = self.patcher.read_several(flat_ids(inputs, self.ids), cache.patch)
        begins, ends = patch.begins(cache.patch), slot_positions(patch.fires, q)
        begin = jnp.maximum(cache.begin[:, None], jax.lax.cummax(jnp.where(begins, place, 0), axis=1))

        def largest(top, column):
            x, begins = column
            top = jnp.where(begins[:, None], x, jnp.maximum(top, x))
            return top, top

        top = jnp.swapaxes(jax.lax.scan(largest, cache.top, (jnp.swapaxes(h, 0, 1), begins.T))[1], 0, 1)
        new = self.pool.cross.shared_keys(h)

        def run():
            rows = jnp.arange(b)[:, None]
            keys, values = (x.at[rows, place].set(y, mode="drop") for x, y in zip((cache.keys, cache.values), new))
            index, first, last = jnp.arange(keys.shape[1]), *(compact(x, ends)[..., None] for x in (begin, place))
            pool = jax.vmap(self.pool.one, (1, None, None, 1), 1)
            patches = pool(compact(top, ends), keys, values, (index >= first) & (index <= last))
            o, main = self.main.extend(self._widen(patches), cache.main)
            return main, self._layer_keys(self.part(o))

        main, read = if_needed(jnp.any(patch.fires), run)
        join = lambda old, new: jnp.concatenate([old[:, :, None], new], axis=2)  # noqa: E731
        read = join(cache.read[0], read[0]), join(cache.read[1], read[1])
        guide = PatchSlots(self.read, read[0], read[1], jnp.cumsum(patch.fires, axis=1))
        trails = {}

        def decode(x, guide=None):
            y, trails["decoder"] = self.decoder.extend(x, cache.decoder, guide)
            return y

        y = self._decode(decode, h, guide)
        return self.head(y), BLTTrail(encoder, main, trails["decoder"], ids, patch, begin, top, *new, read), y

    def keep(self, cache: BLTCache, trail: BLTTrail, kept: Int[Array, " b"]) -> BLTCache:
        """The cache after the first `kept` inputs of a trail."""
        index = jnp.arange(trail.begin.shape[1])
        within = index < kept[:, None]
        whole = jnp.sum(trail.patch.fires & within, axis=1)  # patches
        rows, room = jnp.arange(len(kept)), cache.keys.shape[1]
        place = jnp.where(within, cache.encoder.lengths[:, None] + index, room)
        keys, values = (
            old.at[rows[:, None], place].set(new, mode="drop")
            for old, new in ((cache.keys, trail.keys), (cache.values, trail.values))
        )
        recent = jnp.take_along_axis(trail.ids, kept[:, None] + jnp.arange(self._longest_group), axis=1)
        return BLTCache(
            self.encoder.keep(cache.encoder, trail.encoder, kept), keep_some(self.main, cache.main, trail.main, whole),
            self.decoder.keep(cache.decoder, trail.decoder, kept), recent,
            self.patcher.after(cache.patch, trail.patch, kept), newest(trail.begin, kept, cache.begin),
            newest(trail.top, kept, cache.top), keys, values,
            jax.tree.map(lambda x: x[:, rows, whole], trail.read),
        )  # fmt: skip

    def empty_cache(self, b: int, max_length: int) -> BLTCache:
        """The cache of rows that have seen nothing yet."""
        c, d = self.config, self.config.encoder.d_model
        encoder, main, decoder = (stack.empty_cache(b, max_length) for stack in (self.encoder, self.main, self.decoder))
        held = jnp.zeros((b, max_length, c.encoder.kv_heads, c.encoder.head_width), c.dtype)
        read = jnp.zeros((self._reading_layers, b, c.queries, c.decoder.num_heads, c.decoder.head_width), c.dtype)
        return BLTCache(
            encoder, main, decoder, jnp.zeros((b, self._longest_group), jnp.int32),
            self.patcher.no_bytes(b, max_length), jnp.zeros(b, jnp.int32), jnp.zeros((b, d), c.dtype), held, held,
            (read, read),
        )  # fmt: skip
