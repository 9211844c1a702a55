"""Documents cut into pieces, as a random-access source."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from bytelm.config import ConfigError
from bytelm.data.corpus import Corpus, PreparedCorpus
from bytelm.data.functional import count_pieces, document_piece, locate_piece
from bytelm.data.marks import Marks, MarksError
from bytelm.data.prepared import mapped_table
from bytelm.data.readers import DataError
from bytelm.data.sources import cache_folder
from bytelm.vocab import ByteIds, ReservedByteError


class Pieces:
    """Random-access source of document pieces: item i is {"columns": int32 [n, 3]}: inputs, targets, `first` + i; with
    `marks`, a fourth column has those of the inputs.

    The third column stays with the positions through packing, so that a batch can say where it came from.
    """

    def __init__(
        self,
        corpus: Corpus,
        piece: int,
        ids: ByteIds,
        first: int = 0,
        cache_dir: str = "",
        marks: Marks | None = None,
    ):
        self._arguments = (corpus, piece, ids, first, cache_dir, marks)
        self.corpus, self.piece, self.ids, self.first, self.marks = corpus, piece, ids, first, marks
        self.ends = piece_ends(corpus, piece, cache_dir)
        if first + len(self) > np.iinfo(np.int32).max:
            raise ConfigError(f"the training text makes over 2^31 pieces of {piece:,} bytes: raise data.piece_bytes")

    def __reduce__(self):  # tables do not travel to worker processes
        return Pieces, self._arguments

    def __len__(self) -> int:
        return int(self.ends[-1])

    def where(self, index: int) -> str:
        """File and bytes of an item, for messages."""
        document, start = locate_piece(self.ends, index, self.piece)
        size = int(self.corpus.stop[document] - self.corpus.start[document])
        name, offset = self.corpus.place(document)
        return f"{name}[{offset + start}:{offset + min(start + self.piece, size)}]"

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int32]]:
        document, start = locate_piece(self.ends, index, self.piece)
        data = self.corpus.read(document, max(start - 1, 0), start + self.piece)
        before = data[0] if start > 0 else None
        last = start + self.piece > int(self.corpus.lengths[document])
        body = data[1:] if start > 0 else data
        try:
            pair = document_piece(body, before, last, self.ids)
        except ReservedByteError as e:
            raise DataError(f"{self.where(index)}: {e} (data.reserved)") from None
        columns = [pair, np.full(len(pair), self.first + index, np.int32)]
        if self.marks is not None:
            try:
                columns.append(self._marks(self.marks, document, start, data, len(pair)))
            except MarksError as e:
                raise DataError(f"{self.where(index)}: {e}") from None
        return {"columns": np.column_stack(columns)}

    def _marks(self, marks: Marks, document: int, start: int, data: bytes, count: int) -> NDArray[np.int32]:
        """Marks of a piece's inputs: the start symbol, or the byte before, and the bytes behind it."""
        cleaned = self.ids.clean(data)
        found = marks.read(document, max(start - 1, 0), data, cleaned)
        found = found[len(self.ids.clean(data[:1])) - 1 :] if start else found
        symbol = np.full(1 if start == 0 else 0, marks.symbol, np.int32)
        return np.concatenate([symbol, found.astype(np.int32)])[:count]


def piece_ends(corpus: Corpus, piece: int, cache_dir: str) -> NDArray[np.int64]:
    """Where the pieces of each document end, numbered through. That of a prepared corpus is kept on disk."""
    if not isinstance(corpus, PreparedCorpus):
        return np.cumsum(count_pieces(corpus.lengths, piece))

    def fill(table: NDArray[np.int64]) -> None:
        before, some = 0, 1 << 20
        for i in range(0, len(table), some):
            table[i : i + some] = before + np.cumsum(
                count_pieces(corpus.stop[i : i + some] - corpus.start[i : i + some], piece)
            )
            before = int(table[min(i + some, len(table)) - 1])

    name = hashlib.sha256(f"{corpus.described['sha256']} {piece}".encode()).hexdigest()[:16]
    return mapped_table(cache_folder(cache_dir) / "pieces" / f"{name}.npy", len(corpus), fill)
