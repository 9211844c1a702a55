"""How much of a context a model still uses when it is noised: bits per byte of clean text behind noised text.

A difference of bits alone would reward a model that ignores its context, so a score is also given as the share of the
context's help that is left: (without - noised) / (without - clean), where `without` is the bits per byte of the same
text with nothing in front of it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bytelm.data.corpus import Corpus
from bytelm.data.noise import Noise, noised
from bytelm.protocol import ByteLM
from bytelm.vocab import complete_prefix

CONTEXT, CONTINUATION = 512, 256  # bytes, before noise


@dataclass(frozen=True)
class Passage:
    """Two neighbouring stretches of a document, cut at characters."""

    name: str  # of its place, which its noise depends on
    context: bytes
    text: bytes


def passages(corpus: Corpus, count: int, context: int = CONTEXT, text: int = CONTINUATION) -> list[Passage]:
    """At most `count` passages at even distances over the documents that are long enough, which do not overlap."""
    size = context + text
    fitting = [(i, n) for i, n in enumerate(corpus.lengths.tolist()) if n >= size + 6]  # and both ends may move by 3
    rooms = np.cumsum([n // (size + 6) for _, n in fitting])
    total = int(rooms[-1]) if fitting else 0
    found = []
    for place in (np.arange(min(count, total)) * total // max(min(count, total), 1)).tolist():
        document = int(np.searchsorted(rooms, place, side="right"))
        index, length = fitting[document]
        within = place - (int(rooms[document - 1]) if document else 0)
        start = within * (length // (length // (size + 6)))
        data = corpus.read(index, start, start + size + 3)
        first = next((k for k in range(min(4, len(data))) if data[k] & 0xC0 != 0x80), 0)
        middle = first + complete_prefix(data[first : first + context])
        end = middle + complete_prefix(data[middle : middle + text])
        found.append(Passage(f"{index}:{start}", data[first:middle], data[middle:end]))
    return found


@dataclass(frozen=True)
class Recovery:
    """Nats of each passage's text after a context of each kind, and its bytes."""

    bytes: NDArray[np.int64]
    without: NDArray[np.float64]
    clean: NDArray[np.float64]
    noised: dict[str, NDArray[np.float64]]

    def bits(self, nats: NDArray[np.float64]) -> float:
        """Bits per byte over all passages."""
        return float(nats.sum() / self.bytes.sum() / math.log(2))

    def recovered(self, rule: str) -> float:
        """The share of the context's help that is left; nan where even a clean context does not help."""
        helped = float(self.without.sum() - self.clean.sum())
        return float(self.without.sum() - self.noised[rule].sum()) / helped if helped > 0 else math.nan


def measure(lm: ByteLM, found: Sequence[Passage], rules: Mapping[str, Noise], seed: int = 0) -> Recovery:
    """Scores each passage's text after nothing, its context, and its context under each rule."""

    def nats(contexts: list[bytes]) -> NDArray[np.float64]:
        return -np.array([score.total for score in lm.score_batch([p.text for p in found], contexts)])

    def under(name: str) -> list[bytes]:
        return [noised(p.context, rules[name], seed=seed, document=p.name, field="context", name=name) for p in found]

    return Recovery(
        np.array([len(p.text) for p in found], np.int64), nats([b""] * len(found)), nats([p.context for p in found]),
        {name: nats(under(name)) for name in rules},
    )  # fmt: skip
