"""Arithmetic coding with a byte language model: bits per byte made real, without loss.

A compressed text is one byte that names the format, its length, a check of the model and one of the text, and the code.
Probabilities are asked for byte by byte, on one cache, in the windows of `score`, when coding and when decoding: the
same numbers twice, on the same machine. A byte that the model gives no probability costs 32 bits, and the model begins
anew behind it. The coder is the one of Witten, Neal and Cleary (1987), with 48-bit bounds.
"""

import hashlib
import zlib
from collections.abc import Callable

import jax
import numpy as np

from bytelm.config import ConfigError
from bytelm.following import Follower
from bytelm.protocol import ByteLM, ImpossibleText
from bytelm.windows import DEFAULT_WINDOW

FORMAT = 0xB1
BITS = 48  # of the coder's bounds
TOTAL = 1 << 32  # into which a byte's probabilities are rounded
_TOP, _HALF, _QUARTER = (1 << BITS) - 1, 1 << (BITS - 1), 1 << (BITS - 2)


class CodeError(ValueError):
    """A compressed text that cannot be read; the message says why."""


class Encoder:
    """Writes symbols, each as the stretch [low, high) of `total` that its probability takes."""

    def __init__(self):
        self._low, self._high, self._waiting = 0, _TOP, 0
        self._bits = bytearray()  # one bit each

    def write(self, low: int, high: int, total: int) -> None:
        size = self._high - self._low + 1
        self._high = self._low + size * high // total - 1
        self._low += size * low // total
        while True:
            if self._high < _HALF:
                self._put(0)
            elif self._low >= _HALF:
                self._put(1)
                self._low, self._high = self._low - _HALF, self._high - _HALF
            elif self._low >= _QUARTER and self._high < _HALF + _QUARTER:
                self._waiting += 1
                self._low, self._high = self._low - _QUARTER, self._high - _QUARTER
            else:
                return
            self._low, self._high = self._low << 1, self._high << 1 | 1

    def _put(self, bit: int) -> None:
        self._bits.append(bit)
        self._bits.extend([1 - bit] * self._waiting)
        self._waiting = 0

    def finish(self) -> bytes:
        """The code. All of it is kept, zeros too: a text of a byte that always has the lowest stretch is nothing else,
        and the decoder can tell a code that was cut off from one that ends."""
        self._waiting += 1
        self._put(int(self._low >= _QUARTER))
        return np.packbits(np.frombuffer(self._bits, np.uint8)).tobytes()


class Decoder:
    """Reads what `Encoder` wrote."""

    def __init__(self, code: bytes):
        self._bits = iter(np.unpackbits(np.frombuffer(code, np.uint8)).tolist())
        self._low, self._high, self._value, self._past = 0, _TOP, 0, 0
        for _ in range(BITS):
            self._value = self._value << 1 | self._bit()

    def overrun(self) -> bool:
        """Whether more was read than the code has: it looks as far ahead as its bounds are wide, and no further."""
        return self._past > BITS

    def _bit(self) -> int:
        bit = next(self._bits, None)
        self._past += bit is None
        return bit or 0

    def place(self, total: int) -> int:
        """Where of `total` the next symbol's stretch lies."""
        return ((self._value - self._low + 1) * total - 1) // (self._high - self._low + 1)

    def read(self, low: int, high: int, total: int) -> None:
        """Goes on behind a symbol with this stretch."""
        size = self._high - self._low + 1
        self._high = self._low + size * high // total - 1
        self._low += size * low // total
        while True:
            if self._high < _HALF:
                shift = 0
            elif self._low >= _HALF:
                shift = _HALF
            elif self._low >= _QUARTER and self._high < _HALF + _QUARTER:
                shift = _QUARTER
            else:
                return
            self._low, self._high = self._low - shift << 1, self._high - shift << 1 | 1
            self._value = self._value - shift << 1 | self._bit()


class _Law:
    """The stretches that the 256 bytes take, one text byte after the other."""

    def __init__(self, lm: ByteLM, length: int, known: Callable[[], bytes]):
        """`known`: the text up to the byte that is asked for."""
        self._lm, self._length, self._known = lm, length, known
        window = min(lm.window, DEFAULT_WINDOW)
        self._window = max(window - 3, 1) if hasattr(lm, "vocabulary") else window  # room to begin at a character
        self._next = 0  # where the window after this one begins to be scored
        self._dead = 0  # bytes that the model does not look back to
        self._follower: Follower | None = None
        self._logs = np.zeros(0)

    def stretches(self, at: int) -> np.ndarray:
        """Ends of the stretches for byte `at`, [257], from 0 on."""
        if at == self._next:
            self._next = at + self._window
            # As scoring_windows does without a context: disjoint, the last one slid back to be full.
            text, first = self._known(), max(min(at, self._length - self._window), 0)
            try:
                if self._dead > first:
                    text, first = text[self._dead :], 0
                self._follower = self._lm.reopen(text, first)
                self._logs = self._follower.logprobs()[0]
            except ImpossibleText:
                self._anew(at)
        assert self._follower is not None
        shares = np.exp(self._logs[:256])
        shares = np.where(np.isfinite(shares), shares, 0.0)
        sizes = np.floor(shares * (TOTAL - 512)).astype(np.int64) + 1
        return np.concatenate([[0], np.cumsum(sizes)])

    def take(self, at: int, byte: int) -> None:
        """Byte `at` was this one."""
        assert self._follower is not None
        if not np.isfinite(self._logs[byte]):
            self._anew(at + 1)
        elif at + 1 < min(self._length, self._next):
            self._follower.push([byte])
            self._logs = self._follower.logprobs()[0]

    def _anew(self, at: int) -> None:
        self._dead = at
        self._follower = self._lm.follow([b""])
        self._logs = self._follower.logprobs()[0]


def fingerprint(lm: ByteLM) -> bytes:
    """Two bytes that differ between models: of their weights and how they read."""
    params = getattr(lm, "params", None)
    if params is None:
        params = lm.model.params  # pyrefly: ignore[missing-attribute]
    found = hashlib.sha256(f"{type(lm).__name__} {lm.window} {getattr(lm, 'semantics', '')}".encode())
    for leaf in jax.tree.leaves(params):
        found.update(np.ascontiguousarray(np.asarray(leaf)).view(np.uint8).tobytes())
    return found.digest()[:2]


def compress(lm: ByteLM, text: bytes) -> bytes:
    """A text's code. Raises ConfigError for a model that does not go on with texts."""
    _check(lm)
    encoder = Encoder()
    at = 0
    law = _Law(lm, len(text), lambda: text[:at])
    for at, byte in enumerate(text):
        ends = law.stretches(at)
        encoder.write(int(ends[byte]), int(ends[byte + 1]), int(ends[-1]))
        law.take(at, byte)
    check = zlib.crc32(text).to_bytes(4, "little")
    return bytes([FORMAT]) + _number(len(text)) + fingerprint(lm) + check + encoder.finish()


def decompress(lm: ByteLM, code: bytes) -> bytes:
    """The text of a code. Raises CodeError where it is no code, of another model, or damaged."""
    _check(lm)
    if not code or code[0] != FORMAT:
        raise CodeError("this is not a text that `bytelm compress` wrote")
    length, at = _read_number(code, 1)
    if len(code) < at + 6:
        raise CodeError("the compressed text is cut off")
    if code[at : at + 2] != fingerprint(lm):
        raise CodeError("the text was compressed with another model (other weights, window or semantics)")
    check, decoder, text = code[at + 2 : at + 6], Decoder(code[at + 6 :]), bytearray()
    law = _Law(lm, length, lambda: bytes(text))
    for n in range(length):
        ends = law.stretches(n)
        total = int(ends[-1])
        byte = int(np.searchsorted(ends, decoder.place(total), side="right")) - 1
        if not 0 <= byte < 256:
            raise CodeError("the compressed text is damaged")
        decoder.read(int(ends[byte]), int(ends[byte + 1]), total)
        if decoder.overrun():
            raise CodeError("the compressed text is cut off, or its length is damaged")
        text.append(byte)
        law.take(n, byte)
    if zlib.crc32(text).to_bytes(4, "little") != check:
        raise CodeError("the compressed text is damaged, or was made on a machine whose arithmetic differs (another "
                        "device, version of jax, or precision)")  # fmt: skip
    return bytes(text)


def _check(lm: ByteLM) -> None:
    if not hasattr(lm, "params") and not hasattr(lm, "model"):
        raise ConfigError("this model has no weights to tell it by")
    if hasattr(lm, "deletion"):
        raise ConfigError("an encoder-decoder reads an input first: it does not compress a text")


def _number(n: int) -> bytes:
    """A whole number, seven bits a byte, lowest first."""
    out = bytearray()
    while n >= 128:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def _read_number(data: bytes, at: int) -> tuple[int, int]:
    """(number, where it ends)."""
    n = shift = 0
    while at < len(data) and shift < 63:
        n |= (data[at] & 127) << shift
        if data[at] < 128:
            return n, at + 1
        at, shift = at + 1, shift + 7
    raise CodeError("the compressed text is cut off")
