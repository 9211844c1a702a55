"""Texts that grow byte by byte: asking a model at every step, and drawing from it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bytelm.generate import Sampling
from bytelm.vocab import END


class Follower(ABC):
    """Some texts that grow together."""

    @abstractmethod
    def logprobs(self) -> NDArray[np.float64]:
        """ln p of the next symbol of each text, [n, 257]."""

    @abstractmethod
    def push(self, symbols: Sequence[int]) -> None:
        """One more byte for each text; a text that is given END has ended, and is asked no more."""


class Rereading(Follower):
    """Asks about every text from its beginning at every step: for models that keep nothing between questions."""

    def __init__(self, ask: Callable[[list[bytes]], NDArray[np.float64]], texts: Sequence[bytes]):
        self._ask, self._texts = ask, list(texts)
        self._ended = [False] * len(texts)

    def logprobs(self) -> NDArray[np.float64]:
        out = np.full((len(self._texts), END + 1), -np.inf)
        live = [i for i, ended in enumerate(self._ended) if not ended]
        out[live] = self._ask([self._texts[i] for i in live])
        return out

    def push(self, symbols: Sequence[int]) -> None:
        for i, symbol in enumerate(symbols):
            if symbol == END:
                self._ended[i] = True
            else:
                self._texts[i] += bytes([symbol])


def score_steps(follower: Follower, text: bytes) -> NDArray[np.float64]:
    """ln p of each byte of a text behind what the follower's one text is so far, [n]: byte by byte, -inf from the first
    impossible byte on."""
    logs = np.full(len(text), -np.inf)
    for n, byte in enumerate(text):
        logs[n] = follower.logprobs()[0, byte]
        if not np.isfinite(logs[n]):
            break
        follower.push([byte])
    return logs


def choose(logs: NDArray[np.float64], sampling: Sampling, rng: np.random.Generator) -> int:
    """Draws a symbol: top_k first, then top_p of what is left, keeping the symbol that crosses p."""
    if sampling.temperature == 0:
        return int(np.argmax(logs))
    order = np.argsort(-logs, kind="stable")
    ranked = logs[order] / sampling.temperature
    if sampling.top_k:
        ranked[sampling.top_k :] = -np.inf
    p = np.exp(ranked - ranked[0])
    p /= p.sum()
    p[np.cumsum(p) - p >= sampling.top_p] = 0
    return int(order[rng.choice(len(p), p=p / p.sum())])


def draw_rows(
    follower: Follower, rows: int, max_bytes: int, sampling: Sampling, seed: int, stop: tuple[bytes, ...], block: int
) -> Iterator[list[bytes]]:
    """New bytes of each text, every `block` bytes and at the end. Row i draws with a generator of (seed, i)."""
    rngs = [np.random.default_rng([seed, i]) for i in range(rows)]
    symbols: list[int] = []

    def step(done: list[bool]) -> list[bytes | None]:
        nonlocal symbols
        if symbols:
            follower.push([END if ended else symbol for ended, symbol in zip(done, symbols)])
        logs = follower.logprobs()
        symbols = [END if done[i] else choose(logs[i], sampling, rngs[i]) for i in range(rows)]
        return [None if symbol == END else bytes([symbol]) for symbol in symbols]

    return emit(step, rows, max_bytes, stop, block)


def emit(
    step: Callable[[list[bool]], list[bytes | None]], rows: int, max_bytes: int, stop: tuple[bytes, ...], block: int
) -> Iterator[list[bytes]]:
    """New bytes of each text, about every `block` bytes and at the end. `step`, told which texts have ended, gives the
    next bytes of each, or None where it ends. A text also ends in front of a `stop` string, and after `max_bytes`."""
    made, done, given = [bytearray() for _ in range(rows)], [max_bytes == 0] * rows, [0] * rows
    wait = max((len(s) for s in stop), default=1) - 1  # bytes that may be the beginning of a stop string are held back
    due = block
    while not all(done):
        for i, new in enumerate(step(list(done))):
            if done[i]:
                continue
            seen = max(len(made[i]) - wait, 0)
            made[i] += new or b""
            found = [(place + len(s), place) for s in stop if (place := made[i].find(s, seen)) >= 0]
            end, place = min(found, default=(max_bytes + 1, 0))
            done[i] = new is None or end <= max_bytes or len(made[i]) >= max_bytes
            del made[i][place if end <= max_bytes else max_bytes :]
        if max(map(len, made)) >= due and not all(done):
            due += block
            yield [bytes(part) for part in _released(made, given, done, wait)]
    yield [bytes(part) for part in _released(made, given, done, 0)]


def _released(made: list[bytearray], given: list[int], done: list[bool], wait: int) -> Iterator[bytearray]:
    """What may be shown of each text and has not been."""
    for i, text in enumerate(made):
        end = len(text) if done[i] else max(len(text) - wait, given[i])
        yield text[given[i] : end]
        given[i] = end
