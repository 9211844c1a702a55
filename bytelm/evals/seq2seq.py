"""Scores of an encoder-decoder on examples with known targets."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bytelm.data.seq2seq import Row

# rows, stacked -> what models/t5_report.py says of each
Report = Callable[[dict[str, NDArray]], dict[str, NDArray]]


@dataclass(frozen=True)
class TargetScore:
    """How well targets are predicted, each id given those in front of it, and how much of the sources was deleted.

    Bits per byte here are bits per target id, the end symbol and sentinels among them, as MrT5's tables have it.
    """

    nats: float
    bytes: int  # target ids
    examples: int
    right: int  # ids that would have been written
    whole: int  # examples with every id right
    sources: int  # ids of the sources
    kept: int  # of which the encoder keeps so many
    longest: float  # mean over batches of the longest kept row as a share of the row
    soft_bpb: float | None = field(default=None)  # with the gate's values instead of hard deletion

    @property
    def bpb(self) -> float:
        """Bits per target id; nan when nothing was scored."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def more(self) -> dict[str, float]:
        """For the log, beside the bits per byte."""
        out = {
            "heldout_accuracy": self.right / max(self.bytes, 1),
            "heldout_sequence_accuracy": self.whole / max(self.examples, 1),
            "heldout_deleted": 1 - self.kept / max(self.sources, 1),
            "heldout_longest": self.longest,
        }
        return out if self.soft_bpb is None else out | {"heldout_soft_bpb": self.soft_bpb}


def batched(rows: Iterable[Row], size: int) -> Iterator[tuple[dict[str, NDArray], int]]:
    """Rows stacked by `size`, the last batch filled up with empty ones: (batch, real rows)."""
    group: list[Row] = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield {name: np.stack([r[name] for r in group]) for name in row}, size
            group = []
    if group:
        empty = {name: np.zeros_like(x) for name, x in group[0].items()}
        filled = group + [empty] * (size - len(group))
        yield {name: np.stack([r[name] for r in filled]) for name in empty}, len(group)


def score_targets(report: Report, rows: Iterable[Row], batch_size: int) -> TargetScore | None:
    """Scores rows in batches; None when there are none."""
    totals: dict[str, float] = {"nats": 0.0, "targets": 0, "right": 0, "real": 0, "kept": 0}
    whole = examples = batches = 0
    longest = 0.0
    for batch, count in batched(rows, batch_size):
        found = {name: np.asarray(x)[:count] for name, x in report(batch).items()}
        for name in totals:
            totals[name] += float(np.sum(found[name], dtype=np.float64))
        whole += int((found["right"] == found["targets"]).sum())
        longest += float(found["kept"].max()) / batch["source"].shape[1]
        examples, batches = examples + count, batches + 1
    if not examples:
        return None
    return TargetScore(
        totals["nats"], int(totals["targets"]), examples, int(totals["right"]), whole, int(totals["real"]),
        int(totals["kept"]), longest / batches,
    )  # fmt: skip
