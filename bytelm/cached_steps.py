"""Texts that grow byte by byte on a network's cache: one step a byte, and nothing is read twice."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from bytelm.following import Follower
from bytelm.generate import Decoder, bucket, pad_rows
from bytelm.protocol import log_softmax
from bytelm.vocab import END, ByteIds


@partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def _step(graph, params, inputs, cache):
    return nnx.merge(graph, params).step(inputs, cache)


class CachedSteps(Follower):
    """`inputs_of` says what the network reads of a text; a text that outgrows `window` inputs is read anew by it."""

    def __init__(
        self,
        decoder: Decoder,
        ids: ByteIds,
        texts: Sequence[bytes],
        inputs_of: Callable[[bytes], NDArray[np.int32]],
        window: int,
    ):
        self._decoder, self._ids, self._inputs_of, self._window = decoder, ids, inputs_of, window
        self._symbols, self._possible = ids.symbol_ids(), ids.possible()
        self._texts, self._ended = list(texts), [False] * len(texts)
        self._read()

    def _read(self) -> None:
        """Reads every text from where it is visible, with room for as much again."""
        rows = [self._inputs_of(text) for text in self._texts]
        if not rows:
            self._logits, self._longest, self._room = np.zeros((0, max(self._symbols) + 1)), 0, 1
            return
        self._longest = max(map(len, rows))
        width = min(bucket(self._longest, 32), self._window)
        self._room = min(bucket(2 * self._longest, 64), self._window)
        inputs, lengths = pad_rows(rows, bucket(len(rows)), width)
        self._logits, self._cache = self._decoder.prefill(inputs, lengths, self._room)

    def logprobs(self) -> NDArray[np.float64]:
        logits = np.asarray(self._logits)[: len(self._texts)][:, self._symbols]
        logs = log_softmax(logits, self._possible)
        logs[self._ended] = -np.inf
        return logs

    def push(self, symbols: Sequence[int]) -> None:
        anew = self._longest >= self._room
        for i, symbol in enumerate(symbols):
            if symbol == END:
                self._ended[i] = True
            elif not self._ended[i]:
                self._texts[i] += bytes([symbol])
                anew |= not self._possible[symbol]  # a reserved byte, which is refused, or read as others
        if anew:
            self._read()
            return
        row = np.zeros(len(self._logits), np.int32)
        row[: len(symbols)] = self._symbols[list(symbols)]
        self._logits, self._cache = _step(*self._decoder.steps, row, self._cache)
        self._longest += 1
