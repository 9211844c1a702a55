"""MegaByte (Yu et al. 2023, arXiv 2305.07185), as SpaceByte's authors wrote it: patches of a fixed size.

The bytes of a patch, embedded side by side, are one input of the global stack; its output for the patches before, and
the bytes of the patch so far, are what a small local stack predicts the patch from. The first patch of a document is
predicted from a learned vector, and the first byte of each from one in place of the byte before.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bytelm.config import MegaByteConfig
from bytelm.models.base import Output
from bytelm.models.spacebyte import SPACEBYTE_IDS, VOCABULARY
from bytelm.models.units import make_units, unit_output
from bytelm.nn.cache import StackCache, if_needed, keep_some, newest, pick
from bytelm.nn.compaction import compact, expand, slot_positions
from bytelm.nn.layers import Affine, Embedding, Linear
from bytelm.nn.stack import Stack


@jax.tree_util.register_dataclass
@dataclass
class MegaByteCache:
    """What decoding keeps: inputs so far, the last patch of them, the global outputs for the patch of now."""

    place: Int[Array, " b"]
    recent: Int[Array, "b p"]  # the newest inputs, newest last
    main: StackCache
    local: StackCache  # of the patch of now
    coarse: Float[Array, "b p d"]


@jax.tree_util.register_dataclass
@dataclass
class MegaByteTrail:
    """Of several inputs that a network has read and may keep. Patch 0 is the one that they go on with."""

    inputs: Int[Array, "b s"]  # behind the last patch of inputs before
    main: Any
    coarse: Float[Array, "b n p d"]
    local: Any  # of all patches: b n rows
    patch: Int[Array, "b q"]  # of each input
    slot: Int[Array, "b q"]  # its place among the new ones of its patch


class MegaByte(nnx.Module):
    """Global embedding and stack, local embedding and stack, head. Position t predicts byte t + 1; patch j of a
    document are the predictions of its bytes P j to P (j + 1) - 1."""

    ids = SPACEBYTE_IDS

    def __init__(self, config: MegaByteConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        more = dict(std=c.init_std, dtype=c.dtype, rngs=rngs)
        d, wide_, patch = c.local.d_model, c.main.d_model, c.patch
        vector = lambda *shape: nnx.Param((c.init_std or 1) * jax.random.normal(rngs.params(), shape, jnp.float32))  # noqa: E731
        self.embed = Embedding(VOCABULARY, wide_ // patch, **more)
        if c.positions:
            self.positions = Embedding(c.positions, wide_ // patch, **more)
        self.first_patch = vector(wide_)
        self.main = Stack(c.main, closing_norm=False, **more)
        self.coarse = Affine((wide_ // patch,), (d,), bias=True, dtype=c.dtype, rngs=rngs)
        self.local_embed = Embedding(VOCABULARY, d, **more)
        self.first_byte, self.offsets = vector(d), vector(patch, d)
        self.local = Stack(dataclasses.replace(c.local, window=patch), **more)
        self.head = Linear((d,), (VOCABULARY,), **more, widen=True)

    def _patches(self, inputs: Int[Array, "*b p"], place: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        """What the global stack reads for the patch whose first prediction stands at `place` of its document, from the
        inputs of the patch before, the last of which stands there."""
        x = self.embed(inputs)
        if hasattr(self, "positions"):
            x = x + self.positions(place[..., None] + jnp.arange(self.config.patch))  # of the bytes to predict
        x = x.reshape(*x.shape[:-2], -1)
        return jnp.where((place > 0)[..., None], x, self.first_patch[...].astype(x.dtype))

    def _coarse(self, y: Float[Array, "*b e"]) -> Float[Array, "*b p d"]:
        """Global outputs as what each offset of the patch is given."""
        return self.coarse(y.reshape(*y.shape[:-1], self.config.patch, -1))

    def _local_inputs(self, inputs, offset):
        x = self.local_embed(inputs)
        x = x + self.offsets[...][offset].astype(x.dtype)
        return jnp.where((offset == 0)[..., None], self.first_byte[...].astype(x.dtype), x)

    def _global_inputs(self, inputs, units):
        index = units.first[..., None] - self.config.patch + 1 + jnp.arange(self.config.patch)
        b, c, p = index.shape
        before = jnp.take_along_axis(inputs, jnp.clip(index, 0, inputs.shape[1] - 1).reshape(b, c * p), axis=1)
        return self._patches(before.reshape(b, c, p), compact(units.place, units.first))

    def _units(self, inputs, segments):
        b, t = inputs.shape
        place = make_units(jnp.zeros((b, t), bool), segments, 1).place
        slots = None if segments is not None else -(-t // self.config.patch)
        return make_units(place % self.config.patch == 0, segments, slots)

    def __call__(
        self,
        inputs: Int[Array, "b t"],
        segments: Int[Array, "b t"] | None = None,
        capacity: tuple[int, ...] | None = None,
        marks: Int[Array, "b t"] | None = None,
    ) -> Output:
        """Logits of the next id after each input, and the level of patches. `capacity` is the number of patch slots."""
        units = self._units(inputs, segments)
        if capacity is not None:
            units = make_units(units.begins, segments, capacity[0])
        offset = units.place % self.config.patch
        y = self.main(self._global_inputs(inputs, units), segments=units.document)
        coarse = self._coarse(y)
        rows = jnp.arange(len(inputs))[:, None]
        x = coarse[rows, jnp.minimum(units.number, units.slots - 1), offset]
        x = jnp.where(units.kept[..., None], x, 0) + self._local_inputs(inputs, offset)
        y = self.local(x, segments=units.number)
        return unit_output(self.head(y), units, inputs, segments, limited=capacity is not None)

    def prefill(
        self, inputs: Int[Array, "b t"], lengths: Int[Array, " b"], max_length: int
    ) -> tuple[Float[Array, "b v"], MegaByteCache]:
        """Logits after each row's last input and the cache behind it; rows are right-padded, lengths at least 1."""
        b, patch = inputs.shape[0], self.config.patch
        units = self._units(inputs, None)
        number = (lengths - 1) // patch  # of the patch that the last input is in
        y, main = self.main.prefill(self._global_inputs(inputs, units), number + 1, max_length)
        coarse = self._coarse(expand(y, number[:, None])[:, 0])
        # The patch of now goes through the local stack byte by byte, to fill its cache.
        begin = number * patch

        def one(carry, offset):
            local, kept = carry
            at = jnp.minimum(begin + offset, inputs.shape[1] - 1)[:, None]
            x = coarse[:, offset] + self._local_inputs(jnp.take_along_axis(inputs, at, 1)[:, 0], jnp.full(b, offset))
            here = begin + offset < lengths
            y, local = self.local.step(x, local, here)
            return (local, jnp.where(here[:, None], y, kept)), None

        empty = self.local.empty_cache(b, patch)
        (local, y), _ = jax.lax.scan(one, (empty, jnp.zeros_like(coarse[:, 0])), jnp.arange(patch))
        recent = jnp.clip(lengths[:, None] - patch + jnp.arange(patch), 0, inputs.shape[1] - 1)
        return self.head(y), MegaByteCache(lengths, jnp.take_along_axis(inputs, recent, 1), main, local, coarse)

    def step(self, inputs: Int[Array, " b"], cache: MegaByteCache) -> tuple[Float[Array, "b v"], MegaByteCache]:
        """Logits after one more input per row. The global stack runs where a patch begins."""
        offset = cache.place % self.config.patch
        begins = offset == 0
        recent = jnp.concatenate([cache.recent[:, 1:], inputs[:, None]], axis=1)

        def run(carry):
            coarse, main = carry
            y, main = self.main.step(self._patches(recent, cache.place), main, begins)
            return jnp.where(begins[:, None, None], self._coarse(y), coarse), main

        coarse, main = jax.lax.cond(jnp.any(begins), run, lambda carry: carry, (cache.coarse, cache.main))
        local = dataclasses.replace(cache.local, lengths=jnp.where(begins, 0, cache.local.lengths))
        x = coarse[jnp.arange(inputs.shape[0]), offset] + self._local_inputs(inputs, offset)
        y, local = self.local.step(x, local)
        return self.head(y), MegaByteCache(cache.place + 1, recent, main, local, coarse)

    def _local_caches(self, cache: MegaByteCache, count: int) -> StackCache:
        """The local cache of each row's patch of now, and behind it those of patches that have not begun."""
        first = jnp.arange(count) == 0
        lengths = jnp.where(first, cache.local.lengths[:, None], 0).reshape(-1)
        return StackCache(lengths, jax.tree.map(lambda v: jnp.repeat(v, count, axis=1), cache.local.runs))

    def extend(
        self, inputs: Int[Array, "b q"], cache: MegaByteCache
    ) -> tuple[Float[Array, "b q v"], MegaByteTrail, Float[Array, "b q d"]]:
        """After each of several more inputs per row: logits, the trail that `keep` reads, what the logits are made of.
        The global stack reads all patches that begin in them at once, and so does the local one."""
        (b, q), size = inputs.shape, self.config.patch
        rows, new = jnp.arange(b)[:, None], -(-q // size)
        place = cache.place[:, None] + jnp.arange(q)
        offset = place % size
        begins = offset == 0
        every = jnp.concatenate([cache.recent, inputs], axis=1)
        at = slot_positions(begins, new)  # q in an empty slot
        read = (at[..., None] + 1 + jnp.arange(size)).reshape(b, -1)
        before = jnp.take_along_axis(every, jnp.minimum(read, q + size - 1), axis=1).reshape(b, new, size)
        patches = self._patches(before, cache.place[:, None] + at)
        y, main = if_needed(jnp.any(begins), lambda: self.main.extend(patches, cache.main))
        coarse = jnp.concatenate([cache.coarse[:, None], self._coarse(y)], axis=1)

        patch = jnp.cumsum(begins, axis=1)
        slot = jnp.where(patch == 0, jnp.arange(q), offset)
        x = coarse[rows, patch, offset] + self._local_inputs(inputs, offset)
        spread = jnp.zeros((b, new + 1, size, x.shape[-1]), x.dtype).at[rows, patch, slot].set(x)
        y, local = self.local.extend(spread.reshape(b * (new + 1), size, -1), self._local_caches(cache, new + 1))
        y = y.reshape(spread.shape)[rows, patch, slot]
        return self.head(y), MegaByteTrail(every, main, coarse, local, patch, slot), y

    def keep(self, cache: MegaByteCache, trail: MegaByteTrail, kept: Int[Array, " b"]) -> MegaByteCache:
        """The cache after the first `kept` inputs of a trail."""
        b, count = trail.coarse.shape[:2]
        zero = jnp.zeros(b, jnp.int32)
        patch = newest(trail.patch, kept, zero)  # of now
        read = jnp.where(jnp.arange(count) == patch[:, None], newest(trail.slot + 1, kept, zero)[:, None], 0)
        local = self.local.keep(self._local_caches(cache, count), trail.local, read.reshape(-1))
        now = jnp.arange(b) * count + patch
        local = StackCache(local.lengths[now], jax.tree.map(lambda v: v[:, now], local.runs))
        recent = jnp.take_along_axis(trail.inputs, kept[:, None] + jnp.arange(self.config.patch), axis=1)
        main = keep_some(self.main, cache.main, trail.main, patch)
        return MegaByteCache(cache.place + kept, recent, main, local, pick(trail.coarse, patch))

    def empty_cache(self, b: int, max_length: int) -> MegaByteCache:
        """The cache of rows that have seen nothing yet."""
        c = self.config
        return MegaByteCache(
            jnp.zeros(b, jnp.int32), jnp.zeros((b, c.patch), jnp.int32), self.main.empty_cache(b, max_length),
            self.local.empty_cache(b, c.patch), jnp.zeros((b, c.patch, c.local.d_model), c.dtype),
        )  # fmt: skip
