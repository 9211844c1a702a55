"""Chunk boundaries of a text: read from a network window by window, and counted. Pure numpy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.vocab import REPLACEMENT, ByteIds
from bytelm.windows import overlapping_windows


@dataclass(frozen=True)
class Boundaries:
    """One chunking level of a text: the places that could start a chunk (every byte at level 0, the chunk starts of the
    level below deeper in), how probable that is, and whether it does. The start of the document is not among them."""

    offset: NDArray[np.int64]  # byte of the text
    probability: NDArray[np.float64]
    cut: NDArray[np.bool_]

    @property
    def starts(self) -> NDArray[np.int64]:
        """Byte offsets of chunk starts."""
        return self.offset[self.cut]


@dataclass(frozen=True)
class LevelRow:
    """One row of a network's chunking level (`models.base.Level`), on the host: each [c]."""

    position: NDArray[np.int32]
    valid: NDArray[np.bool_]
    probability: NDArray[np.floating]
    boundary: NDArray[np.bool_]


def first_rows(levels: Sequence[Any]) -> list[LevelRow]:
    """The first row of each level of a forward pass."""
    return [LevelRow(*(np.asarray(getattr(level, f.name)[0]) for f in fields(LevelRow))) for level in levels]


def text_boundaries(
    levels_of: Callable[[NDArray[np.int32]], Sequence[LevelRow]], text: bytes, ids: ByteIds, window: int
) -> list[Boundaries]:
    """Boundaries of a text at each level, outermost first.

    `levels_of` gives, for one row of input ids, the levels of a forward pass over it, padded on the right or not.
    Texts longer than `window` are read in windows that overlap by half. Offsets are of the caller's text, also where
    reserved bytes were replaced.
    """
    cleaned = ids.clean(text)
    widths = np.ones(len(text), np.int64)
    if len(cleaned) != len(text):
        widths[ids.reserved_positions(text)] = len(REPLACEMENT)
    origin = np.repeat(np.arange(len(text)), widths)
    found: list[list[tuple]] = []
    for inputs, first, new in overlapping_windows(cleaned, ids, window):
        levels = levels_of(inputs)
        found = found or [[] for _ in levels]
        for out, level in zip(found, levels):
            byte = level.position + first
            keep = level.valid & (level.position < len(inputs)) & (byte >= new)
            out.append((byte[keep], level.probability[keep], level.boundary[keep]))
    joined = [[np.concatenate(part) for part in zip(*out)] for out in found]
    return [_one_place_a_byte(origin[byte], np.asarray(p, np.float64), cut) for byte, p, cut in joined]


def _one_place_a_byte(offset: NDArray, probability: NDArray, cut: NDArray) -> Boundaries:
    """Boundaries with each offset once: a replaced byte is cut where any byte in its place is."""
    if not len(offset) or (np.diff(offset) > 0).all():
        return Boundaries(offset, probability, cut)
    first = np.flatnonzero(np.diff(offset, prepend=-1) > 0)
    return Boundaries(offset[first], np.maximum.reduceat(probability, first), np.logical_or.reduceat(cut, first))


@dataclass(frozen=True)
class ChunkStats:
    """What the chunks of one level of a text look like. Beside each share of the boundaries stands that of all bytes,
    which boundaries put anywhere would meet."""

    chunks: int
    bytes_per_chunk: float
    lengths: tuple[int, int, int, int]  # 10th, 50th, 90th and 99th percentile, in bytes
    at_space: float  # the chunk's first byte, or the one before it, is ASCII white space
    bytes_at_space: float
    inside_character: float  # the chunk starts at a continuation byte of UTF-8
    bytes_inside_character: float
    mean_probability: float  # over all places that could start a chunk


def chunk_stats(text: bytes, level: Boundaries) -> ChunkStats:
    """Counts the chunks of a level; the bytes before its first boundary belong to the document's first chunk."""
    data = np.frombuffer(text, np.uint8)
    space = np.isin(data, list(b" \t\n\v\f\r"))
    near = space | np.concatenate([[False], space[:-1]]) if len(data) else space
    inside = (data & 0xC0) == 0x80
    starts = level.starts
    lengths = np.diff(np.append(starts, len(data))) if len(starts) else np.array([len(data)])
    p10, p50, p90, p99 = (int(v) for v in np.percentile(lengths, (10, 50, 90, 99), method="lower"))

    def share(mask: NDArray[np.bool_]) -> float:
        return float(mask[starts].mean()) if len(starts) else 0.0

    mean = lambda x: float(x.mean()) if len(x) else 0.0  # noqa: E731
    return ChunkStats(
        len(starts), len(data) / max(len(starts), 1), (p10, p50, p90, p99), share(near), mean(near), share(inside),
        mean(inside), mean(level.probability),
    )  # fmt: skip
