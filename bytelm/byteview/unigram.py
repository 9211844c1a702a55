"""Unigram tokenizers (Kudo 2018): of all ways to write a piece, the one whose tokens' scores add up to most.

A string of tokens is canonical when it is the best way to write its bytes. Its beginnings then are too, so that it is
enough to ask token by token whether some other way to write the last bytes is better: one with a token that crosses the
place where the last token begins, for the token is the best way to write its own bytes.
"""

import bisect
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bytelm.byteview.segmenter import Fallback, Tokens, is_character

PENALTY = 10.0  # the score of a character without a token is so much below the least score
GRID = 2.0**32
FAR = 64  # tokens back that can matter, where no space comes between


class Unigram(Fallback):
    """`scores[id]`: natural log-probability of a token; `fallback[id]`: whether it is a byte of a character that has no
    token."""

    def __init__(self, tokens: Tokens, scores: Sequence[float], fallback: Sequence[bool]):
        self.tokens = tokens
        self.set_fallback(fallback)
        self._score: dict[bytes, tuple[float, int]] = {}
        for i, text in enumerate(tokens):
            if text and not fallback[i]:
                # On a grid, so that sums are exact and ties are ties in whatever order they are summed.
                self._score.setdefault(text, (round(scores[i] * GRID) / GRID, i))
        self._unknown = min((s for s, _ in self._score.values()), default=0.0) - PENALTY
        self._longest = max(map(len, self._score), default=1)
        self._order = sorted(self._score)
        self._own: dict[bytes, float] = {}
        self._words = not any(b" " in text.lstrip(b" ") for text in self._score)  # none crosses from word to word

    def _best(self, piece: bytes) -> tuple[list[float], list[tuple[int, bytes | None]]]:
        """(best score up to each byte, -inf inside a character; where the last part begins, and its text: None for a
        character without a token). Whole characters."""
        n = len(piece)
        best: list[float] = [-np.inf] * (n + 1)
        last: list[tuple[int, bytes | None]] = [(0, None)] * (n + 1)
        best[0] = 0.0
        for begin in range(n):
            if best[begin] == -np.inf or piece[begin] & 0xC0 == 0x80:
                continue
            step = next((k for k in range(begin + 1, n) if piece[k] & 0xC0 != 0x80), n)
            if piece[begin:step] not in self._score and best[begin] + self._unknown > best[step]:
                best[step], last[step] = best[begin] + self._unknown, (begin, None)
            for end in range(step, min(begin + self._longest, n) + 1):
                found = self._score.get(piece[begin:end])
                if found and best[begin] + found[0] > best[end]:
                    best[end], last[end] = best[begin] + found[0], (begin, piece[begin:end])
        return best, last

    def encode(self, piece: bytes) -> list[int] | None:
        _, last = self._best(piece)
        out: list[int] = []
        end = len(piece)
        while end:
            begin, text = last[end]
            ids = self.spell(piece[begin:end]) if text is None else [self._score[text][1]]
            if ids is None:
                return None
            out, end = [*ids, *out], begin
        return out

    @property
    def reach(self) -> int:
        return FAR

    def tail(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        tokens = tokens[-FAR:]
        if self._words:
            for n in range(len(tokens) - 1, 0, -1):
                before, text = self.tokens[tokens[n - 1]] or b"", self.tokens[tokens[n]] or b""
                if text.startswith(b" ") and not before.endswith(b" "):
                    return tokens[n:]
        return tokens

    def following(self, tokens: tuple[int, ...]) -> NDArray[np.bool_]:
        partial = self.unfinished(tokens)
        if partial:
            return self._uncrossed(self.finishing(partial), tokens, partial)
        return self._uncrossed(self.beginning, tokens, b"")

    def _uncrossed(self, out: NDArray[np.bool_], tokens: tuple[int, ...], partial: bytes) -> NDArray[np.bool_]:
        """Of some tokens, [v], those with which no other way to write the end of the text is better."""
        before = b"".join(self.tokens[i] or b"" for i in tokens).removesuffix(partial)
        while before and before[0] & 0xC0 == 0x80:  # the tail may begin inside a character
            before = before[1:]
        best, _ = self._best(before)
        out, n = out.copy(), len(before)
        for begin in range(max(n - self._longest + 1, 0), n):
            if best[begin] == -np.inf:
                continue
            head = before[begin:]
            for text in self._longer(head):
                self._bar(out, partial, text[len(head) :], best[begin] + self._score[text][0], best[n])
        return out

    def _bar(self, out: NDArray[np.bool_], partial: bytes, rest: bytes, crossing: float, here: float) -> None:
        """Takes out the tokens that are a worse way to go on from the score `here` than a token that crosses into them,
        over the bytes `rest`, with a score of `crossing` behind it. Of equal ways the one whose last token begins
        earlier is taken."""
        byte = None  # that ends a character without a token, if that is what the crossing token writes
        if is_character(rest) and rest[:-1] == partial and crossing >= here + self._unknown:
            byte = self._byte[rest[-1]]
        if byte is not None:
            out[byte] = False
        if partial:
            return
        found = self._score.get(rest)
        if found and crossing >= here + found[0]:
            out[found[1]] = False
        for text in self._longer(rest):
            score, i = self._score[text]
            if out[i] and crossing + self._own_best(text[len(rest) :]) > here + score:
                out[i] = False

    def _own_best(self, text: bytes) -> float:
        if text not in self._own:
            self._own[text] = self._best(text)[0][len(text)]
        return self._own[text]

    def _longer(self, head: bytes) -> Iterator[bytes]:
        """The tokens' texts that begin with `head` and are longer."""
        for place in range(bisect.bisect_right(self._order, head), len(self._order)):
            if not self._order[place].startswith(head):
                break
            yield self._order[place]
