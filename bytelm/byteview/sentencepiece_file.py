"""SentencePiece's tokenizer.model (a protocol buffer) as a Vocabulary: BPE and unigram, perhaps with byte fallback."""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from bytelm.byteview.pretokenizer import Pretokenizer
from bytelm.byteview.segmenter import NEVER, CharacterPairs, Segmenter
from bytelm.byteview.tokenizer_json import SPACE
from bytelm.byteview.unigram import Unigram
from bytelm.byteview.vocabulary import Vocabulary, check_added, usual_end
from bytelm.config import ConfigError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # ModelProto.SentencePiece.Type
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message; values of 4 and 8 bytes as they stand. Raises ValueError."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            if place >= len(data) or shift > 63:
                raise ValueError("ends in the middle of a number")
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}.get(wire, -1)
        if size < 0 or place + size > len(data):
            raise ValueError(f"field {number} reaches past the end, or is of an unknown kind")
        yield number, data[place : place + size]
        place += size


def _message(data: int | bytes) -> dict[int, int | bytes]:
    """The last value of each field."""
    if isinstance(data, int):
        raise ValueError("a number stands where a message should")
    return dict(_fields(data))


def read_sentencepiece(path: Path, *, size: int = 0, start: int | None = None, ends: Sequence[int] = ()) -> Vocabulary:
    """The vocabulary of a .model file. `size`: ids of the network, where it has more. Raises ConfigError."""
    pieces: list[tuple[bytes, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = _message(value)
                text, score = piece.get(1, b""), piece.get(2, b"\0\0\0\0")
                if not isinstance(text, bytes) or not isinstance(score, bytes):
                    raise ValueError("a piece has no text or no score")
                pieces.append((text, struct.unpack("<f", score)[0], int(piece.get(3, NORMAL))))
            elif number == 2:
                trainer = _message(value)
            elif number == 3:
                normalizer = _message(value)
    except (OSError, ValueError, struct.error) as e:
        raise ConfigError(f"{path}: cannot be read as a SentencePiece model ({e})") from None
    if not pieces:
        raise ConfigError(f"{path}: is no SentencePiece model (it has no pieces)")
    kind = int(trainer.get(3, UNIGRAM))
    if kind not in (BPE, UNIGRAM):
        name = {3: "word", 4: "character"}.get(kind, str(kind))
        raise ConfigError(f"{path}: a SentencePiece model of type {name}; BPE and unigram models are read")
    if normalizer.get(2):
        name = normalizer.get(1, b"")
        raise ConfigError(f"{path}: its normalizer {name!r} changes the text: many texts would have the same tokens, "
                          "so there is no byte view of it")  # fmt: skip
    if normalizer.get(4, 1):
        raise ConfigError(f"{path}: it takes away spaces (remove_extra_whitespaces): many texts would have the same "
                          "tokens, so there is no byte view of it")  # fmt: skip
    count = max(size, len(pieces))
    tokens: list[bytes | None] = [None] * count
    fallback = [False] * count
    controls = {}
    order = sorted((i for i, p in enumerate(pieces) if p[2] == NORMAL), key=lambda i: -pieces[i][1])
    rank = np.full(count, NEVER, np.int64)
    rank[order] = np.arange(len(order))
    for i, (text, _, what) in enumerate(pieces):
        if what == BYTE:
            tokens[i], fallback[i] = bytes([int(text[3:5], 16)]), True
        elif what == NORMAL and i not in ends:
            tokens[i] = text.replace(SPACE.encode(), b" ")
        elif what in (CONTROL, USER, UNKNOWN):
            controls[text.decode(errors="replace")] = i
    check_added((text.decode(errors="replace") for text, _, what in pieces if what == USER), str(path))
    lead = b" " if normalizer.get(3, 1) else b""
    if kind == UNIGRAM:
        scores = [pieces[i][1] if i < len(pieces) else 0.0 for i in range(count)]
        segmenter: Segmenter = Unigram(tokens, scores, fallback)
    else:
        segmenter = CharacterPairs(tokens, None, rank.tolist(), fallback=fallback)
    ends = list(ends) or usual_end(controls, str(path))
    return Vocabulary(tuple(tokens), segmenter, Pretokenizer(()), ends, start, lead, controls=controls)
