"""Words of texts in bytes: split, marked for the data pipeline, and found as bytes come.

The rule itself is in `word_rule.py`. Here a text may be any bytes: each byte that is no part of valid UTF-8 is a word
of its own, and a word of more than `max_bytes` is cut at characters.

So that a stretch of a long document can be marked without reading all of it, the rule begins anew at the multiples of
BLOCK bytes before which, for BLOCK bytes, there is no place where it does so by itself (`_restarts`).
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from bytelm.config import ConfigError
from bytelm.data.word_rule import (
    CAUSAL_START,
    CLASS_BITS,
    INVALID,
    START,
    UNKNOWN_SHIFT,
    automaton,
    properties,
    settles_nothing,
    word_starts,
)
from bytelm.vocab import complete_prefix, encode, utf8_length

RULES = ("unicode", "space")
BLOCK = 1 << 14
NEAR = 8  # bytes behind a multiple of BLOCK in which such places are not looked for
LOOK = 64  # bytes read behind a stretch, for the cases where the rule looks ahead; more where they are not enough


@dataclasses.dataclass(frozen=True)
class WordRule:
    """A rule and the longest word, for those who mark texts."""

    rule: str
    max_bytes: int

    def marks(self, data: bytes) -> NDArray[np.uint8]:
        """The mark of each byte of a text."""
        return marks(data, self.rule, self.max_bytes)


def split(text: str, rule: str = "unicode", max_bytes: int = 0) -> list[str]:
    """The words of a text; they add up to it. `max_bytes`: longer words are cut at characters (0: never).

    Raises ValueError for a lone surrogate, ConfigError for a bad rule or limit."""
    data = encode(text)
    ends = [*split_bytes(data, rule, max_bytes)[1:].tolist(), len(data)]
    return [data[a:b].decode() for a, b in zip([0, *ends], ends)] if data else []


def split_bytes(data: bytes, rule: str = "unicode", max_bytes: int = 0) -> NDArray[np.int64]:
    """Offsets at which the words of a text begin."""
    _check(rule, max_bytes)
    return np.flatnonzero(_starts(data, rule, max_bytes, looks=(True,))[0])


def marks(data: bytes, rule: str = "unicode", max_bytes: int = 0) -> NDArray[np.uint8]:
    """The mark of each byte of a text."""
    return stretch_marks(lambda a, b: data[a:b], len(data), 0, len(data), rule, max_bytes)


def stretch_marks(
    read: Callable[[int, int], bytes], size: int, begin: int, end: int, rule: str = "unicode", max_bytes: int = 0
) -> NDArray[np.uint8]:
    """The marks of bytes begin:end of a document of `size` bytes, equal to those of the whole document (but for what
    follows over BLOCK bytes of characters that only go with the one before). `read(a, b)` gives its bytes a:b."""
    _check(rule, max_bytes)
    first = _restart(read, begin, rule)
    data = read(first, _far_enough(read, size, end))
    starts, causal = _starts(data, rule, max_bytes, first)
    known = np.bincount(_known(data, np.flatnonzero(causal)), minlength=len(data) + 1)[:-1]
    unknown = np.cumsum(causal) - np.cumsum(known)
    out = starts * START + causal * CAUSAL_START + (unknown << UNKNOWN_SHIFT)
    return out[begin - first : end - first].astype(np.uint8)


def _far_enough(read: Callable[[int, int], bytes], size: int, end: int) -> int:
    """How far to read so that all that the rule says up to `end` is decided: two characters behind it that are neither
    white nor go with the one before."""
    for look in (LOOK, 16 * LOOK, BLOCK):
        if end + look >= size:
            return size
        code = properties()[_decode(read(end, end + look))[0]]
        if (~settles_nothing(code) & ((code & CLASS_BITS) != INVALID)).sum() > 2:
            break
    return end + look


def _check(rule: str, max_bytes: int) -> None:
    if rule not in RULES:
        raise ConfigError(f"word rule {rule!r}: choose one of {', '.join(RULES)}")
    if max_bytes and max_bytes < 4:
        raise ConfigError(f"max_bytes={max_bytes}: must hold a character of 4 bytes (0 = no limit)")


def _decode(data: bytes) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Code points (invalid bytes as lone surrogates) and the offset of each character, with the end as the last."""
    text = data.decode("utf-8", "surrogateescape")
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    if len(points) == len(data):
        return points, np.arange(len(data) + 1)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    widths[(points >= 0xDC80) & (points < 0xDD00)] = 1
    return points, np.concatenate([[0], np.cumsum(widths)])


def _starts(
    data: bytes, rule: str, max_bytes: int, base: int = 0, looks: tuple[bool, ...] = (True, False)
) -> list[NDArray[np.bool_]]:
    """Whether a word begins at each byte, with and without look-ahead (as `looks` asks), for a text that stands at
    `base` of its document, where the rule begins."""
    out = [np.zeros(len(data), bool) for _ in looks]
    for a, b in itertools.pairwise([0, *_restarts(data, rule, base), len(data)]):
        points, offset = _decode(data[a:b])
        code = properties()[points]
        for lookahead, whole in zip(looks, out):
            starts = word_starts(code, rule, lookahead)
            if max_bytes:
                _cut_long(starts, offset, max_bytes)
            whole[a + offset[:-1][starts]] = True
    return out


def _cut_long(starts: NDArray[np.bool_], offset: NDArray[np.int64], max_bytes: int) -> None:
    """Also begins a word at the character that would make the one before longer than `max_bytes`."""
    at = np.flatnonzero(starts)
    ends = np.append(at[1:], len(starts))
    for a, b in zip(at[(long := offset[ends] - offset[at] > max_bytes)].tolist(), ends[long].tolist()):
        while offset[b] - offset[a] > max_bytes:
            a = int(np.searchsorted(offset, offset[a] + max_bytes, side="right")) - 1
            starts[a] = True


def _known(data: bytes, starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each word start, the byte with which it is known that one is there: the last of its first character, or what
    shows that the bytes so far are none; len(data) where the text ends before."""
    first = np.frombuffer(data, np.uint8)[starts]
    known = starts + (first >= 0xC2) + (first >= 0xE0) + (first >= 0xF0)
    points, offset = _decode(data)
    invalid = offset[:-1][properties()[points] == INVALID]
    for s in np.intersect1d(invalid, starts, assume_unique=True).tolist():
        ends = (e for e in range(s, min(s + 4, len(data))) if _decided(data, e + 1, s))
        known[np.searchsorted(starts, s)] = next(ends, len(data))
    return known


def _decided(data: bytes, end: int, at: int) -> bool:
    """Whether the byte `at` can no longer be part of a character that goes on behind data[:end]."""
    tail = max(end - 4, 0)
    return tail + complete_prefix(data[tail:end]) > at


def _safe(x: NDArray[np.uint8], rule: str) -> NDArray[np.int64]:
    """Places from the fourth byte on where a word begins whatever comes before, and where what comes before does not
    matter for later ones: behind a line's end, at a space behind a character of the common scripts, between two Chinese
    characters, at a Thai consonant behind such a script; by the `space` rule at a letter or digit behind white space.
    Some, not all, of these places."""
    if len(x) < 4:
        return np.zeros(0, np.int64)
    at, before, second, third = x[3:], x[2:-1], x[1:-2], x[:-3]
    if rule == "space":
        return np.flatnonzero(_ALNUM[at] & _WHITE[before]) + 3
    tail, tail2 = (before & 0xC0) == 0x80, (second & 0xC0) == 0x80
    common = (before < 0x80) & (before != 0x20) | tail & (second >= 0xC3) & (second < 0xE0)
    common |= tail & tail2 & _THREE[third]
    chinese = tail & tail2 & _HAN[third] & _HAN[at]
    found = (before == 0x0A) | (at == 0x20) & common | chinese
    if 0xE0 in x:
        following = np.append(x[4:], [0, 0])
        thai = (at == 0xE0) & (following[:-1] == 0xB8) & (following[1:] >= 0x81) & (following[1:] <= 0xAE)
        found |= thai & tail & tail2 & (third == 0xE0)
    return np.flatnonzero(found) + 3


def _table(*bytes_: int) -> NDArray[np.bool_]:
    out = np.zeros(256, bool)
    out[list(bytes_)] = True
    return out


_ALNUM = _table(*range(0x30, 0x3A), *range(0x41, 0x5B), *range(0x61, 0x7B))
_WHITE = _table(0x09, 0x0A, 0x0D, 0x20)
_HAN = _table(*range(0xE5, 0xE9))  # first bytes of U+5000 to U+8FFF
_THREE = _HAN | _table(0xE0, 0xEB, 0xEC)  # and of U+0800 to U+0FFF and U+B000 to U+CFFF: no white space among them


def _restart(read: Callable[[int, int], bytes], position: int, rule: str) -> int:
    """The last place at or before `position` from which a document can be split as if it began there."""
    block = position // BLOCK * BLOCK
    for low, high in ((block + NEAR, position), (block - BLOCK + NEAR, block)):
        for back in (128, 2048, BLOCK):
            begin = max(high - back, low, 3)
            if begin <= high:
                found = _safe(np.frombuffer(read(begin - 3, high + 1), np.uint8), rule)
                if len(found):
                    return begin - 3 + int(found[-1])
        if block == 0:
            return 0
    return _character(read(block - 3, block + 1), 3) + block - 3


def _character(data: bytes, at: int) -> int:
    """`at`, or the first byte of the character of which it is a later one."""
    for back in range(1, 4):
        if at < len(data) and data[at] & 0xC0 == 0x80 and utf8_length(data[at - back]) > back:
            return at - back
    return at


def _restarts(data: bytes, rule: str, base: int) -> list[int]:
    """Places of a text at `base` of its document, where the rule begins, at which it is made to begin anew: multiples
    of BLOCK without a place of their own from NEAR bytes behind the multiple before."""
    out = []
    for at in range(BLOCK - base % BLOCK, len(data), BLOCK):
        low = at - BLOCK + NEAR
        if low > 0 and not len(_safe(np.frombuffer(data[low - 3 : at + 1], np.uint8), rule)):
            out.append(_character(data, at))
    return out


class Splitter:
    """Words as bytes come, by the rule without look-ahead (BLOCK and the end of the text aside)."""

    def __init__(self, rule: str = "unicode", max_bytes: int = 0):
        _check(rule, max_bytes)
        self._automaton, self._max = automaton(rule), max_bytes
        self._state, self._word, self._tail = 0, b"", b""

    @property
    def pending(self) -> bytes:
        """What belongs to no finished word yet."""
        return self._word + self._tail

    def push(self, data: bytes) -> list[bytes]:
        """Reads bytes; gives the words that are now known to be finished."""
        done = []
        for byte in data:
            self._tail += bytes([byte])
            whole, self._tail = self._tail[: (n := complete_prefix(self._tail))], self._tail[n:]
            for character in whole.decode("utf-8", "surrogateescape"):
                width = len(character.encode("utf-8", "surrogateescape"))
                kind = self._automaton.code_class[ord(character)]
                full = self._max and len(self._word) + width > self._max
                if self._word and (full or self._automaton.begins[self._state, kind]):
                    done.append(self._word)
                    self._word = b""
                self._state = self._automaton.next[self._state, kind]
                self._word += character.encode("utf-8", "surrogateescape")
        return done
