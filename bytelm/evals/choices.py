"""Questions with a right answer, asked of any byte language model: picking one of several endings by likelihood, or
writing the answer out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bytelm.data.noise import Draws
from bytelm.protocol import ByteLM

GROUP = 512  # endings scored at once, so that a run that is stopped loses little


@dataclass(frozen=True)
class Question:
    """A context and the endings to choose from; endings hold the space that separates them from the context. `stems`
    are what their scores are normalised by the length of (default: the endings)."""

    context: bytes
    endings: tuple[bytes, ...]
    answer: int
    stems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choices:
    """What a model makes of some questions; rows of unequal length are padded with -inf (endings that are not)."""

    nats: NDArray[np.float64]  # [n, endings] ln p of each ending
    bytes: NDArray[np.float64]  # [n, endings] UTF-8 bytes of its stem, or of it
    characters: NDArray[np.float64]  # [n, endings] code points of the same
    answer: NDArray[np.int64]  # [n]

    def right(self, by: str = "sum") -> NDArray[np.bool_]:
        """Which questions are right by the sum of log-probabilities, or that over `bytes` or `characters`. Of equals
        the first is picked; a question whose endings are all impossible is wrong."""
        with np.errstate(invalid="ignore"):
            scores = self.nats / {"sum": 1.0, "bytes": self.bytes, "characters": self.characters}[by]
        return (scores.argmax(axis=1) == self.answer) & np.isfinite(scores.max(axis=1))


def ask(lm: ByteLM, questions: Sequence[Question]) -> Choices:
    """Scores every ending of every question after its context."""
    n, width = len(questions), max(len(q.endings) for q in questions)
    nats = np.full((n, width), -np.inf)
    sizes = np.ones((2, n, width))
    flat = [(i, j, q.context, ending) for i, q in enumerate(questions) for j, ending in enumerate(q.endings)]
    for begin in range(0, len(flat), GROUP):
        part = flat[begin : begin + GROUP]
        scores = lm.score_batch([ending for *_, ending in part], [context for *_, context, _ in part])
        for (i, j, *_), score in zip(part, scores):
            nats[i, j] = score.total
    for i, q in enumerate(questions):
        for j, ending in enumerate(q.stems or q.endings):
            stem = ending if isinstance(ending, str) else ending.decode("utf-8", "surrogateescape")
            sizes[:, i, j] = max(len(stem.encode("utf-8", "surrogateescape")), 1), max(len(stem), 1)
    return Choices(nats, sizes[0], sizes[1], np.array([q.answer for q in questions], np.int64))


def interval(values: NDArray, seed: int = 0, draws: int = 1000, level: float = 0.95) -> tuple[float, float]:
    """A bootstrap interval of the mean of some values [n]."""
    rng = np.random.default_rng(seed)
    means = np.asarray(values, np.float64)[rng.integers(0, len(values), (draws, len(values)))].mean(axis=1)
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(means, (tail, 100 - tail))
    return float(low), float(high)


def corruptions(units: Sequence[str], draws: Draws, count: int, alphabet: Sequence[str]) -> list[tuple[str, ...]]:
    """`count` strings of units that differ from the one given and from each other, each by one slip: two neighbours
    change places, a unit is left out, doubled, or becomes another of the alphabet (an empty string gets one)."""
    right = tuple(units)
    found: list[tuple[str, ...]] = []
    slips = [(kind, place) for kind in ("swap", "omit", "double", "other") for place in range(len(right))]
    for kind, place in draws.shuffled(slips) + [("other", place) for place in range(max(len(right), 1))] * 50:
        wrong = list(right)
        if kind == "swap" and place + 1 < len(wrong):
            wrong[place : place + 2] = wrong[place + 1], wrong[place]
        elif kind == "omit" and len(wrong) > 1:
            del wrong[place]
        elif kind == "double":
            wrong.insert(place, wrong[place])
        elif kind == "other":
            wrong[place : place + 1] = [alphabet[draws.below(len(alphabet))]]
        if tuple(wrong) != right and tuple(wrong) not in found:
            found.append(tuple(wrong))
        if len(found) == count:
            return found
    raise ValueError(f"{right}: cannot be got wrong in {count} ways with {alphabet!r}")
