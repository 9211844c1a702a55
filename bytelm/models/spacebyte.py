"""SpaceByte (Slagle 2024, arXiv 2404.14408): a byte transformer, and a wider one at the bytes that begin a patch.

Each byte goes through the initial blocks; bytes that begin a run of what is neither letter nor digit also through the
global ones, whose output is added at that byte alone; then all go through the final blocks.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bytelm.config import SpaceByteConfig
from bytelm.models.base import Output
from bytelm.models.units import Units, make_units, unit_output
from bytelm.nn.cache import StackCache, if_needed, keep_some, newest
from bytelm.nn.compaction import compact, expand, newest_slot, slot_positions
from bytelm.nn.layers import Embedding, Linear
from bytelm.nn.stack import Stack
from bytelm.vocab import ByteIds

SPACEBYTE_IDS = ByteIds(start=255, end=255, reserved=b"\xff")
VOCABULARY = 256


def spacelike(byte: Int[Array, "*b"]) -> Bool[Array, "*b"]:
    """What is no ASCII letter or digit and no continuation byte of UTF-8 (the start symbol is such a byte too)."""
    lower = byte | 0x20
    word = ((byte >= 0x30) & (byte <= 0x39)) | ((lower >= 0x61) & (lower <= 0x7A) & (byte < 0x80))
    return ~word & ((byte < 0x80) | (byte >= 0xC0))


@jax.tree_util.register_dataclass
@dataclass
class SpaceByteCache:
    """What decoding keeps."""

    initial: StackCache
    main: StackCache
    final: StackCache
    before: Int[Array, " b"]  # the input of the step before; -1 at first


@jax.tree_util.register_dataclass
@dataclass
class SpaceByteTrail:
    """Of several inputs that a network has read and may keep."""

    initial: Any
    main: Any
    final: Any
    inputs: Int[Array, "b q"]
    begins: Bool[Array, "b q"]


class SpaceByte(nnx.Module):
    """Embedding, initial blocks, global blocks at patches, final blocks, head."""

    ids = SPACEBYTE_IDS

    def __init__(self, config: SpaceByteConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        more = dict(std=c.init_std, dtype=c.dtype, rngs=rngs)
        d, wider = c.initial.d_model, c.main.d_model
        self.embed = Embedding(VOCABULARY, d, **more)
        if c.positions:
            self.positions = Embedding(c.positions, d, **more)
        if c.slots:
            self.ranks = Embedding(c.slots, wider, **more)
        self.initial = Stack(c.initial, closing_norm=False, **more)
        self.main = Stack(c.main, closing_norm=False, **more)
        self.final = Stack(c.final, **more)
        self.head = Linear((d,), (VOCABULARY,), **more, widen=True)

    def _begins(self, byte, before, place) -> Bool[Array, "*b"]:
        """Whether a patch begins at bytes, given the byte before (-1: none) and the place in the document."""
        if self.config.patches == "periodic":
            return place % self.config.period == 0
        return (spacelike(byte) & ~((before >= 0) & spacelike(before))) | (byte == self.ids.start)

    def _units(self, inputs, segments, slots: int | None) -> Units:
        before = jnp.pad(inputs[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        place = make_units(jnp.zeros(inputs.shape, bool), segments, 1).place
        return make_units(self._begins(inputs, before, place), segments, slots)

    def _enter(self, inputs, place):
        x = self.embed(inputs)
        return x + self.positions(place) if hasattr(self, "positions") else x

    def _widen(self, x, rank):
        """Vectors at patches with zeros in front, up to the global width."""
        wider = self.config.main.d_model
        x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((wider - x.shape[-1], 0),))
        return x + self.ranks(rank) if hasattr(self, "ranks") else x

    def _at_patches(self, x, units: Units):
        return self._widen(compact(x, units.first), compact(units.index, units.first))

    def _add_patches(self, x, y, units: Units):
        """The last features of the global output at the bytes that begin a patch with a slot."""
        add = expand(y[..., -x.shape[-1] :], jnp.minimum(units.number, units.slots - 1))
        return x + jnp.where((units.begins & units.kept)[..., None], add, 0)

    def __call__(
        self,
        inputs: Int[Array, "b t"],
        segments: Int[Array, "b t"] | None = None,
        capacity: tuple[int, ...] | None = None,
        marks: Int[Array, "b t"] | None = None,
    ) -> Output:
        """Logits of the next id after each input, and the level of patches. Positions from the first patch without a
        slot on are not `scored`: nothing of theirs has gone through the global blocks."""
        t = inputs.shape[1]
        slots = None if capacity is None else capacity[0]
        if self.config.slots:
            slots = min(slots or t, self.config.slots)
        units = self._units(inputs, segments, slots)
        x = self.initial(self._enter(inputs, units.place), segments=segments)
        y = self.main(self._at_patches(x, units), segments=units.document)
        x = self._add_patches(x, y, units)
        y = self.final(x, segments=segments)
        return unit_output(self.head(y), units, inputs, segments, limited=units.slots < t)

    def prefill(
        self, inputs: Int[Array, "b t"], lengths: Int[Array, " b"], max_length: int
    ) -> tuple[Float[Array, "b v"], SpaceByteCache]:
        """Logits after each row's last input and the cache behind it; rows are right-padded, lengths at least 1."""
        b = inputs.shape[0]
        units = self._units(inputs, None, self.config.slots or None)
        rows, last = jnp.arange(b), lengths - 1
        x, initial = self.initial.prefill(self._enter(inputs, units.place), lengths, max_length)
        y, main = self.main.prefill(self._at_patches(x, units), units.number[rows, last] + 1, max_length)
        x = self._add_patches(x, y, units)
        y, final = self.final.prefill(x, lengths, max_length)
        return self.head(y[rows, last]), SpaceByteCache(initial, main, final, inputs[rows, last])

    def step(self, inputs: Int[Array, " b"], cache: SpaceByteCache) -> tuple[Float[Array, "b v"], SpaceByteCache]:
        """Logits after one more input per row. The global blocks run where a patch begins."""
        place, d = cache.initial.lengths, self.config.initial.d_model
        x, initial = self.initial.step(self._enter(inputs, place), cache.initial)
        begins = self._begins(inputs, cache.before, place) | (place == 0)

        def run(main):
            return self.main.step(self._widen(x, main.lengths), main, begins)

        nothing = jnp.zeros((x.shape[0], self.config.main.d_model), x.dtype)
        y, main = jax.lax.cond(jnp.any(begins), run, lambda main: (nothing, main), cache.main)
        x = x + jnp.where(begins[:, None], y[:, -d:], 0)
        y, final = self.final.step(x, cache.final)
        return self.head(y), SpaceByteCache(initial, main, final, inputs)

    def alone(self, inputs: Int[Array, " b"], cache: SpaceByteCache) -> tuple[Float[Array, "b v"], SpaceByteCache]:
        """A step that leaves the global blocks out: a guess."""
        x, initial = self.initial.step(self._enter(inputs, cache.initial.lengths), cache.initial)
        y, final = self.final.step(x, cache.final)
        return self.head(y), SpaceByteCache(initial, cache.main, final, inputs)

    def extend(
        self, inputs: Int[Array, "b q"], cache: SpaceByteCache
    ) -> tuple[Float[Array, "b q v"], SpaceByteTrail, Float[Array, "b q d"]]:
        """After each of several more inputs per row: logits, the trail that `keep` reads, what the logits are made of.
        The global blocks read all patches that begin in them at once."""
        q, d = inputs.shape[1], self.config.initial.d_model
        place = cache.initial.lengths[:, None] + jnp.arange(q)
        x, initial = self.initial.extend(self._enter(inputs, place), cache.initial)
        before = jnp.concatenate([cache.before[:, None], inputs[:, :-1]], axis=1)
        begins = self._begins(inputs, before, place) | (place == 0)
        rank = cache.main.lengths[:, None] + jnp.arange(q)
        patches = self._widen(compact(x, slot_positions(begins, q)), rank)
        y, main = if_needed(jnp.any(begins), lambda: self.main.extend(patches, cache.main))
        x = x + jnp.where(begins[..., None], expand(y[..., -d:], newest_slot(begins, q)), 0)
        y, final = self.final.extend(x, cache.final)
        return self.head(y), SpaceByteTrail(initial, main, final, inputs, begins), y

    def keep(self, cache: SpaceByteCache, trail: SpaceByteTrail, kept: Int[Array, " b"]) -> SpaceByteCache:
        """The cache after the first `kept` inputs of a trail."""
        patches = jnp.sum(trail.begins & (jnp.arange(trail.begins.shape[1]) < kept[:, None]), axis=1)
        return SpaceByteCache(
            self.initial.keep(cache.initial, trail.initial, kept),
            keep_some(self.main, cache.main, trail.main, patches),
            self.final.keep(cache.final, trail.final, kept), newest(trail.inputs, kept, cache.before),
        )  # fmt: skip

    def empty_cache(self, b: int, max_length: int) -> SpaceByteCache:
        """The cache of rows that have seen nothing yet."""
        initial, main, final = (stack.empty_cache(b, max_length) for stack in (self.initial, self.main, self.final))
        return SpaceByteCache(initial, main, final, jnp.full(b, -1, jnp.int32))
