"""How much of a context a model still uses when it is noised: bits per byte of clean text behind noised text.

A difference of bits alone would reward a model that ignores its context, so a score is also given as the share of the
context's help that is left: (without - noised) / (without - clean), where `without` is the bits per byte of the same
text with nothing in front of it.
"""

import math
from dataclasses import dataclass

import numpy as np

from bytelm.data.corpus import Corpus
from bytelm.vocab import complete_prefix

CONTEXT, CONTINUATION = 512, 256  # bytes, before noise
# Rules whose mean stands in the headline; the others are asked beside them where all of the suite is.
NOISES = ("antspeak", "drop", "random_case", "repeat", "upper", "word_replace", "typo_swap", "typo_keyboard")


def recovered(without: float, clean: float, noised: float) -> float:
    """The share of the context's help that is left, from nats or bits of the same text; nan where even a clean context
    does not help."""
    return (without - noised) / (without - clean) if without > clean else math.nan


@dataclass(frozen=True)
class Passage:
    """Two neighbouring stretches of a document, cut between words where there is white space, else at characters."""

    name: str  # of its place, which its noise depends on
    context: bytes
    text: bytes


def passages(corpus: Corpus, count: int, context: int = CONTEXT, text: int = CONTINUATION) -> list[Passage]:
    """At most `count` passages at even distances over the documents that are long enough, which do not overlap."""
    size = context + text
    each = corpus.lengths // (size + 6)  # both ends may move by 3
    rooms = np.cumsum(each)
    total = int(rooms[-1]) if len(rooms) else 0
    found = []
    for place in (np.arange(min(count, total)) * total // max(min(count, total), 1)).tolist():
        index = int(np.searchsorted(rooms, place, side="right"))
        start = int((place - rooms[index] + each[index]) * (corpus.lengths[index] // each[index]))
        data = corpus.read(index, start, start + size + 3)
        first = next((k for k in range(min(4, len(data))) if data[k] & 0xC0 != 0x80), 0)
        middle = first + _word_end(data[first : first + context])
        end = middle + complete_prefix(data[middle : middle + text])
        found.append(Passage(f"{index}:{start}", data[first:middle], data[middle:end]))
    return found


def _word_end(data: bytes) -> int:
    """Where to cut: in front of the last white space near the end, all of it, so that no token of a tokenized model is
    cut in two; in text without, at a character."""
    near = max(len(data) - 48, 0)
    last = max(data.rfind(space, near) for space in (b" ", b"\n", b"\t"))
    found = len(data[: last + 1].rstrip(b" \t\r\n"))
    return found if found >= near and found > 0 else complete_prefix(data)
