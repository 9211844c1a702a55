"""Training text as tokens, for the tokenized models that byte models are compared with: a file of tokens beside each
corpus, and pieces of it in the form of `data.pieces`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np
from numpy.typing import NDArray

from bytelm.config import ConfigError
from bytelm.data.corpus import Corpus
from bytelm.data.functional import count_pieces, locate_piece
from bytelm.data.readers import DataError

Tokens = NDArray[np.int32]
# Other tokens for the same bytes, drawn anew.
Recut = Callable[[Tokens, np.random.Generator], Tokens]


@dataclass(frozen=True)
class TokenIds:
    """What the pipeline knows of a tokenizer."""

    start: int  # id in front of a document
    end: int  # id that follows its last token
    widths: NDArray[np.int32]  # bytes of each token, [v]; 0 for what no text has
    lead: int = 0  # bytes that the tokenizer puts in front of a text


class TokenText:
    """The tokens of a corpus, document after document, out of a file of uint32; beside it where each ends."""

    def __init__(self, path: Path, ids: TokenIds, documents: int):
        """Raises DataError when the files do not fit each other or the corpus."""
        self._arguments = (path, ids, documents)
        self.path, self.ids = path, ids
        try:
            self.ends = np.load(ends_table(path), mmap_mode="r")
            self._tokens = np.memmap(path, np.uint32, mode="r") if path.stat().st_size else np.zeros(0, np.uint32)
        except (OSError, ValueError) as e:
            raise DataError(f"{path}: cannot be read: {e}; remove it, it is made anew") from None
        if len(self.ends) != documents or len(self._tokens) != (int(self.ends[-1]) if documents else 0):
            raise DataError(f"{path}: does not hold the tokens of this text; remove it, it is made anew")

    def __reduce__(self):  # maps do not travel to worker processes
        return TokenText, self._arguments

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.ends, prepend=0)

    def read(self, document: int, begin: int = 0, end: int | None = None) -> Tokens:
        """Tokens begin:end of a document."""
        first, last = int(self.ends[document - 1]) if document else 0, int(self.ends[document])
        last = last if end is None else min(first + end, last)
        return self._tokens[first + begin : max(last, first + begin)].astype(np.int32)


def ends_table(path: Path) -> Path:
    """Where the ends of the documents of a file of tokens stand."""
    return path.with_suffix(".ends.npy")


class TokenPieces:
    """Documents of tokens cut into pieces: item i is {"columns": int32 [n, 4]}: inputs, targets, `first` + i, and the
    bytes of each target. Position p of a document of n tokens predicts token p, and position n its end."""

    def __init__(self, corpus: Corpus, text: TokenText, piece: int, first: int = 0):
        self.corpus, self.text, self.piece, self.first = corpus, text, piece, first
        self.ends = np.cumsum(count_pieces(text.lengths, piece))
        if first + len(self) > np.iinfo(np.int32).max:
            raise ConfigError(f"the training text makes over 2^31 pieces of {piece:,} tokens: raise data.piece_bytes")

    def __reduce__(self):
        return TokenPieces, (self.corpus, self.text, self.piece, self.first)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def where(self, index: int) -> str:
        """File and bytes of an item, for messages."""
        document, start = locate_piece(self.ends, index, self.piece)
        widths, lead = self.text.ids.widths, self.text.ids.lead
        begin = max(int(widths[self.text.read(document, 0, start)].sum()) - lead, 0)
        size = int(widths[self.text.read(document, start, start + self.piece)].sum()) - (lead if start == 0 else 0)
        name, offset = self.corpus.place(document)
        return f"{name}[{offset + begin}:{offset + begin + size}]"

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int32]]:
        document, start = locate_piece(self.ends, index, self.piece)
        ids = self.text.ids
        tokens = self.text.read(document, max(start - 1, 0), start + self.piece)
        before, body = (ids.start, tokens) if start == 0 else (int(tokens[0]), tokens[1:])
        if len(body) < self.piece:
            body = np.append(body, np.int32(ids.end))
        return {"columns": columns(before, body, self.first + index, ids, begins=start == 0)}


def columns(before: int, targets: Tokens, piece: int, ids: TokenIds, begins: bool) -> NDArray[np.int32]:
    """Inputs, targets, number of the piece and bytes of the targets, [n, 4]; `begins`: they begin a document."""
    widths = ids.widths[targets]
    if begins and ids.lead and len(widths) and targets[0] != ids.end:
        widths[0] -= ids.lead
    inputs = np.concatenate([[np.int32(before)], targets[:-1]])
    return np.column_stack([inputs, targets, np.full(len(targets), piece, np.int32), widths]).astype(np.int32)


class Recutting(grain.transforms.RandomMap):
    """Cuts a piece's text into other tokens each time it is read."""

    def __init__(self, recut: Recut, ids: TokenIds):
        self.recut, self.ids = recut, ids

    def random_map(self, element: Any, rng: np.random.Generator) -> Any:
        table = element["columns"]
        targets = table[:, 1]
        ended = targets[-1] == self.ids.end
        body = self.recut(targets[:-1] if ended else targets, rng)
        targets = np.append(body, np.int32(self.ids.end)) if ended else body
        begins = int(table[0, 0]) == self.ids.start
        return {"columns": columns(int(table[0, 0]), targets, int(table[0, 2]), self.ids, begins)}


class RandomSplits:
    """StochasTok (Sims et al. 2025): so many times for each token, one drawn at random becomes two whose bytes are its
    own, drawn from all such pairs; a token that no two others make stays."""

    def __init__(self, tokens: tuple[bytes | None, ...], share: float):
        self.share = share
        ids: dict[bytes, int] = {}
        for i, text in enumerate(tokens):
            if text:
                ids.setdefault(text, i)
        self.pairs: list[list[tuple[int, int]]] = [
            [(ids[t[:cut]], ids[t[cut:]]) for cut in range(1, len(t)) if t[:cut] in ids and t[cut:] in ids] if t else []
            for t in tokens
        ]

    def __call__(self, tokens: Tokens, rng: np.random.Generator) -> Tokens:
        out = tokens.tolist()
        for _ in range(int(self.share * len(out))):
            place = int(rng.integers(len(out)))
            pairs = self.pairs[out[place]]
            if pairs:
                out[place : place + 1] = pairs[int(rng.integers(len(pairs)))]
        return np.array(out, np.int32)
