"""Bits per byte of text, by lm-eval's rolling rule.

Each document is cut into disjoint windows, the last one slid back to be full; each byte is scored once, the first of a
document after the start symbol, the first of a later window after the byte before it. Documents do not see each other.
Bits per byte = nats / ln 2 / scored bytes; end symbols are not scored. A corpus's figure is over all its bytes.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bytelm.data.corpus import Corpus
from bytelm.vocab import ByteIds
from bytelm.windows import row_windows

# (inputs, targets), int [b, t], one window per row -> ln p(target) [b, t]
LogProbs = Callable[[NDArray[np.int32], NDArray[np.int32]], NDArray]
# documents -> nats of each
ScoreDocuments = Callable[[list[bytes]], list[float]]


@dataclass(frozen=True)
class BitsPerByte:
    """A corpus's score."""

    nats: float
    bytes: int
    documents: int
    window: int

    @property
    def bpb(self) -> float:
        """Bits per byte; nan when nothing was scored."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def more(self) -> dict[str, float]:
        """For the log, beside the bits per byte."""
        return {}


def first_bytes(corpus: Corpus, max_bytes: int = 0) -> Iterator[bytes]:
    """Documents of a corpus in order until `max_bytes` (0 = all); the last one is cut there."""
    left = max_bytes or corpus.total_bytes
    for document in range(len(corpus)):
        if left <= 0:
            return
        text = corpus.read(document, 0, left)
        left -= len(text)
        yield text


def window_scorer(logprobs: LogProbs, ids: ByteIds, *, window: int, batch_size: int) -> ScoreDocuments:
    """A `ScoreDocuments` from a function over rows of static shape [batch_size, window]."""

    def targets_of(text: bytes) -> NDArray[np.int32]:
        return np.frombuffer(ids.clean(text), np.uint8).astype(np.int32) + ids.offset

    return row_scorer(logprobs, targets_of, ids.start, window=window, batch_size=batch_size)


def row_scorer(
    logprobs: LogProbs, targets_of: Callable[[bytes], NDArray[np.int32]], start: int, *, window: int, batch_size: int
) -> ScoreDocuments:
    """The same for a model whose ids of a text `targets_of` gives, behind the symbol `start`."""

    def score(documents: list[bytes]) -> list[float]:
        totals = [0.0] * len(documents)
        rows = [(n, *row) for n, text in enumerate(documents) for row in row_windows(targets_of(text), start, window)]
        for begin in range(0, len(rows), batch_size):
            inputs, targets = (np.zeros((batch_size, window), np.int32) for _ in range(2))
            group = rows[begin : begin + batch_size]
            for i, (_, x, y, _) in enumerate(group):
                inputs[i, : len(x)], targets[i, : len(y)] = x, y
            values = np.asarray(logprobs(inputs, targets), np.float64)
            for i, (n, x, _, first) in enumerate(group):
                totals[n] -= float(values[i, first : len(x)].sum())
        return totals

    return score


def bits_per_byte(
    score: ScoreDocuments, documents: Iterable[bytes], window: int, group_bytes: int = 1 << 20
) -> BitsPerByte:
    """Scores documents in groups of about `group_bytes`; `window` is recorded with the result."""
    nats, count, number, waiting = 0.0, 0, 0, 0
    group: list[bytes] = []
    for text in documents:
        group.append(text)
        number, count, waiting = number + 1, count + len(text), waiting + len(text)
        if waiting >= group_bytes:
            nats += sum(score(group))
            group, waiting = [], 0
    return BitsPerByte(nats + sum(score(group)), count, number, window)
