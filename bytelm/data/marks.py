"""What stands beside the bytes of training text for models whose units are found before training: words, by their rule,
or patches, from a file that was made before."""

import hashlib
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bytelm.data.corpus import Corpus
from bytelm.data.prepared import RECORDS
from bytelm.data.readers import DataError
from bytelm.data.word_rule import CAUSAL_START, START
from bytelm.data.words import WordRule, stretch_marks


@runtime_checkable
class Marks(Protocol):
    """The marks of a corpus."""

    symbol: int  # of the start symbol

    def read(self, document: int, begin: int, data: bytes, cleaned: bytes) -> NDArray[np.uint8]:
        """A mark for each byte of `cleaned`, which is `data`, the bytes from `begin` on of a document, with reserved
        bytes replaced."""
        ...


class WordMarks:
    """Where words begin (`data.words`). Where reserved bytes become others, words are those of the stretch alone."""

    symbol = START | CAUSAL_START

    def __init__(self, corpus: Corpus, rule: WordRule):
        self.corpus, self.rule = corpus, rule

    def read(self, document: int, begin: int, data: bytes, cleaned: bytes) -> NDArray[np.uint8]:
        if len(cleaned) != len(data):
            return self.rule.marks(cleaned)
        size = int(self.corpus.lengths[document])
        read = lambda a, b: self.corpus.read(document, a, b)  # noqa: E731
        return stretch_marks(read, size, begin, begin + len(data), self.rule.rule, self.rule.max_bytes)


class MarksError(DataError):
    """Bytes that stored marks say nothing of."""


class StoredMarks:
    """Marks out of a file of one byte for each byte of the corpus, document after document, behind nothing else."""

    symbol = 1  # the first patch of a document is its start symbol

    def __init__(self, corpus: Corpus, path: Path):
        self._arguments = (corpus, path)
        self.path, self._starts = path, np.cumsum(corpus.lengths) - corpus.lengths
        self._marks = load_marks(path, corpus.total_bytes)

    def __reduce__(self):  # the map does not travel to worker processes
        return StoredMarks, self._arguments

    def read(self, document: int, begin: int, data: bytes, cleaned: bytes) -> NDArray[np.uint8]:
        if len(cleaned) != len(data):
            raise MarksError(
                "the text holds bytes that become others (data.reserved=replace), which stored marks do not have: set "
                "data.marks=step"
            )
        first = int(self._starts[document]) + begin
        return self._marks[first : first + len(data)]


def load_marks(path: Path, size: int) -> NDArray[np.uint8]:
    """A file of marks, memory-mapped. Raises DataError when it does not hold `size` of them."""
    try:
        marks = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: cannot be read: {e}; remove it, it is made anew") from None
    if len(marks) != size:
        raise DataError(f"{path}: holds {len(marks):,} marks, the text needs {size:,}; remove it, it is made anew")
    return marks


def corpus_identity(corpus: Corpus) -> str:
    """A hash that changes with the documents of a corpus: of prepared splits by their text, of files by path, size and
    time of change."""
    found = hashlib.sha256("\n".join(corpus.identities()).encode())
    files = [(path, stamp) for path, stamp in zip(corpus.paths, corpus.stamps) if not path.endswith(RECORDS)]
    found.update(repr(files).encode())
    for column in (corpus.file, corpus.start, corpus.stop):
        found.update(np.ascontiguousarray(column).tobytes())
    return found.hexdigest()
