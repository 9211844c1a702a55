"""Bytes, special ids and UTF-8 boundaries.

The public next-symbol space has 257 entries: the bytes 0-255 and END = 256, the end of the text. Each model family maps
it onto ids of its own; the flat family uses the same numbers, and END is also the symbol in front of a document.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

NUM_SYMBOLS = 257
END = 256


def encode(text: str | bytes | bytearray | memoryview) -> bytes:
    """UTF-8 bytes of a string; bytes pass through. A lone surrogate raises ValueError with its position."""
    if isinstance(text, str):
        try:
            return text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise ValueError(f"character {e.start} is a lone surrogate and has no UTF-8 form") from None
    return bytes(text)


def utf8_length(first: int) -> int:
    """Length in bytes of the UTF-8 character that starts with byte `first`; 1 for a byte that can start none."""
    if 0xC2 <= first <= 0xDF:
        return 2
    if 0xE0 <= first <= 0xEF:
        return 3
    if 0xF0 <= first <= 0xF4:
        return 4
    return 1


def _continues(char: bytes, byte: int) -> bool:
    """Whether `byte` may follow the bytes of an unfinished character (Unicode's table of well-formed sequences)."""
    if len(char) == 1:
        low, high = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}.get(
            char[0], (0x80, 0xBF)
        )
        return low <= byte <= high
    return 0x80 <= byte <= 0xBF


def complete_prefix(data: bytes) -> int:
    """Length of the longest prefix of `data` that does not end inside a still-possible UTF-8 character.

    Bytes that can never become valid UTF-8 count as complete, so that a stream of them is not held back for ever.
    """
    for back in range(1, min(3, len(data)) + 1):
        start = len(data) - back
        if data[start] & 0xC0 == 0x80:
            continue
        char = data[start:]
        whole = all(_continues(char[:i], char[i]) for i in range(1, len(char)))
        return start if whole and len(char) < utf8_length(char[0]) else len(data)
    return len(data)


class ReservedByteError(ValueError):
    """A text holds a byte that the model family keeps for itself; the message says where."""


REPLACEMENT = "\ufffd".encode()  # U+FFFD in UTF-8


@dataclasses.dataclass(frozen=True)
class ByteIds:
    """How a model family numbers bytes: id = byte + offset, and the symbols before and after a document."""

    start: int  # id put in front of a document
    end: int  # id that follows its last byte
    offset: int = 0  # id of byte 0
    reserved: bytes = b""  # bytes whose ids mean something else, so that a text must not hold them
    replace: bool = False  # whether they become U+FFFD in a text (else they are refused)

    def symbol_ids(self) -> NDArray[np.int32]:
        """The family's id of each of the 257 public symbols (bytes 0-255, then END)."""
        return np.append(np.arange(256, dtype=np.int32) + self.offset, np.int32(self.end))

    def possible(self) -> NDArray[np.bool_]:
        """Which of the 257 symbols can follow a text: all but the reserved bytes."""
        out = np.ones(NUM_SYMBOLS, bool)
        out[list(self.reserved)] = False
        return out

    def clean(self, text: bytes, where: str = "the text", first: int = 0) -> bytes:
        """The text without reserved bytes: each becomes the three bytes of U+FFFD if `replace`.

        Else raises ReservedByteError naming `where` and the offset, counted from `first`.
        """
        bad = self.reserved_positions(text)
        if not len(bad):
            return text
        if self.replace:
            for byte in self.reserved:
                text = text.replace(bytes([byte]), REPLACEMENT)
            return text
        raise ReservedByteError(
            f"{where} holds byte 0x{text[bad[0]]:02X} at offset {first + bad[0]}, which this model family keeps for "
            "symbols of its own (valid UTF-8 never has it); take it out, or ask for reserved=replace (U+FFFD instead)"
        )

    def reserved_positions(self, text: bytes) -> NDArray[np.int64]:
        """Offsets of reserved bytes in a text."""
        if not self.reserved or not any(byte in text for byte in self.reserved):
            return np.zeros(0, np.int64)
        return np.flatnonzero(np.isin(np.frombuffer(text, np.uint8), list(self.reserved)))


FLAT_IDS = ByteIds(start=END, end=END)
BLT_IDS = ByteIds(start=1, end=2, offset=4)  # 0 and 3 are symbols of the published models that no text has
HNET_IDS = ByteIds(start=254, end=255, reserved=bytes([254, 255]))
T5_IDS = ByteIds(start=0, end=1, offset=3)  # 0 is padding too; what ByT5 keeps for its sentinels are 0xFF, 0xFE, ...
