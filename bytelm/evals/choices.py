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
    neutral: bytes | None = None  # the context without what is asked


@dataclass(frozen=True)
class Choices:
    """What a model makes of some questions; rows of unequal length are padded with -inf (endings that are not)."""

    nats: NDArray[np.float64]  # [n, endings] ln p of each ending
    bytes: NDArray[np.float64]  # [n, endings] UTF-8 bytes of its stem, or of it
    characters: NDArray[np.float64]  # [n, endings] code points of the same
    answer: NDArray[np.int64]  # [n]
    neutral: NDArray[np.float64]  # [n, endings] ln p of each ending after the neutral context; 0 where there is none

    def right(self, by: str = "sum") -> NDArray[np.bool_]:
        """Which questions are right by the sum of log-probabilities, that over `bytes` or `characters`, or by `gain`:
        how much more probable the question makes an ending, which takes out what endings are of themselves (long,
        frequent, misspelt). Of equals the first is picked; a question whose endings are all impossible is wrong."""
        with np.errstate(invalid="ignore"):
            if by == "gain":
                scores = np.where(np.isfinite(self.nats), self.nats - self.neutral, -np.inf)
            else:
                scores = self.nats / {"sum": 1.0, "bytes": self.bytes, "characters": self.characters}[by]
        return (scores.argmax(axis=1) == self.answer) & np.isfinite(scores.max(axis=1))


def ask(lm: ByteLM, questions: Sequence[Question]) -> Choices:
    """Scores every ending of every question after its context, and after its neutral one. Raises FloatingPointError
    where the model's scores are not numbers."""
    n, width = len(questions), max(len(q.endings) for q in questions)
    nats, neutral = np.full((n, width), -np.inf), np.zeros((n, width))
    sizes = np.ones((2, n, width))
    flat = [(nats, i, j, q.context, e) for i, q in enumerate(questions) for j, e in enumerate(q.endings)]
    flat += [(neutral, i, j, q.neutral, e) for i, q in enumerate(questions) if q.neutral is not None
             for j, e in enumerate(q.endings)]  # fmt: skip
    for begin in range(0, len(flat), GROUP):
        part = flat[begin : begin + GROUP]
        scores = lm.score_batch([ending for *_, ending in part], [context for *_, context, _ in part])
        for (table, i, j, *_), score in zip(part, scores):
            table[i, j] = score.total
    if np.isnan(nats).any() or np.isnan(neutral).any():
        raise FloatingPointError("the model's scores are not numbers (nan)")
    for i, q in enumerate(questions):
        for j, ending in enumerate(q.stems or q.endings):
            stem = ending if isinstance(ending, str) else ending.decode("utf-8", "surrogateescape")
            sizes[:, i, j] = max(len(stem.encode("utf-8", "surrogateescape")), 1), max(len(stem), 1)
    return Choices(nats, sizes[0], sizes[1], np.array([q.answer for q in questions], np.int64), neutral)


def interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: right out of total."""
    p, more = right / total, z * z / total
    middle = (p + more / 2) / (1 + more)
    half = z * np.sqrt(p * (1 - p) / total + more / (4 * total)) / (1 + more)
    return float(max(middle - half, 0)), float(min(middle + half, 1))


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
