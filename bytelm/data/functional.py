"""Pure numpy steps of the data pipeline."""

import numpy as np
from numpy.typing import NDArray

from bytelm.vocab import ByteIds


def document_piece(data: bytes, before: int | None, last: bool, ids: ByteIds) -> NDArray[np.int32]:
    """Inputs and targets [n, 2] for a stretch of a document.

    Position p of a document of n bytes predicts byte p from the bytes before it, and position n predicts the end
    symbol. `data` holds the bytes to predict, `before` the byte in front of them (None at the start of a document),
    `last` whether the document ends with them. Each byte is thus predicted exactly once, however a document is cut.
    Bytes that the family reserves become U+FFFD or raise ReservedByteError, as `ids` says.
    """
    if before is not None:
        before = ids.clean(bytes([before]), "the byte before")[-1]
    body = np.frombuffer(ids.clean(data, "the text"), np.uint8).astype(np.int32) + ids.offset
    first = ids.start if before is None else before + ids.offset
    targets = np.append(body, np.int32(ids.end)) if last else body
    inputs = np.concatenate([[np.int32(first)], body])[: len(targets)]
    return np.stack([inputs, targets], axis=1).astype(np.int32)


def count_pieces(lengths: NDArray[np.int64], piece: int) -> NDArray[np.int64]:
    """How many pieces of at most `piece` positions each document of `lengths` bytes (and an end symbol) makes."""
    return -(-(lengths + 1) // piece)


def locate_piece(ends: NDArray[np.int64], index: int, piece: int) -> tuple[int, int]:
    """(document, first position) of piece `index`, where document i owns the pieces ends[i - 1] to ends[i]."""
    document = int(np.searchsorted(ends, index, side="right"))
    before = int(ends[document - 1]) if document else 0
    return document, (index - before) * piece
