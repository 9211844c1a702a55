"""Units of a row of bytes (words, patches): their numbers, and the slots that hold them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bytelm.models.base import Level, Output
from bytelm.models.chunk_metrics import level_metrics
from bytelm.models.chunking import segment_starts
from bytelm.nn.compaction import compact, slot_positions
from bytelm.nn.segment import running_last


@jax.tree_util.register_dataclass
@dataclass
class Units:
    """Which unit each position of a row is of. Slot m holds the row's m-th unit; units past the last slot are dropped
    by position."""

    begins: Bool[Array, "b t"]  # a unit begins here: where it was said, and at every document's start
    number: Int[Array, "b t"]  # of the position's unit in the row
    index: Int[Array, "b t"]  # the same, counted from the document's first unit
    place: Int[Array, "b t"]  # of the position in its document
    first: Int[Array, "b c"]  # position of each slot's first byte; t in an empty slot
    document: Int[Array, "b c"] | None  # of each slot's unit; None: one document a row

    @property
    def slots(self) -> int:
        return self.first.shape[1]

    @property
    def kept(self) -> Bool[Array, "b t"]:
        """Whether the position's unit has a slot."""
        return self.number < self.slots


def make_units(begins: Bool[Array, "b t"], segments: Int[Array, "b t"] | None, slots: int | None) -> Units:
    """The units of rows; `slots` None: as many as there are positions."""
    b, t = begins.shape
    starts = segment_starts(segments, b, t)
    begins = begins | starts
    number = jnp.cumsum(begins, axis=1) - 1
    position = jnp.broadcast_to(jnp.arange(t), (b, t))
    first = slot_positions(begins, t if slots is None else min(slots, t))
    return Units(
        begins, number, number - running_last(starts, number), position - running_last(starts, position), first,
        None if segments is None else compact(segments, first),
    )  # fmt: skip


def unit_output(
    logits: Float[Array, "b t v"],
    units: Units,
    inputs: Int[Array, "b t"],
    segments: Int[Array, "b t"] | None,
    *,
    limited: bool,
) -> Output:
    """The output of a model of units: logits, its level and metrics; what has no slot is not scored. `inputs` are bytes
    (or a symbol above them or below 0); `limited`: whether there are fewer slots than could be needed."""
    b, t = inputs.shape
    position = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
    valid = jnp.ones((b, t), bool) if segments is None else segments > 0
    level = Level(position, valid, units.begins.astype(jnp.float32), units.begins & valid)
    found = level_metrics(level, inputs, valid, units.slots if limited else None)
    metrics = {f"level0/{name}": value for name, value in found.items()}
    return Output(logits, metrics=metrics, levels=(level,), scored=units.kept)
