"""A corpus: documents as stretches of files, read where they lie, so that its size is not bounded by memory."""

import dataclasses
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bytelm.data.prepared import DOCUMENTS, RECORDS, SplitText, load_table, read_manifest
from bytelm.data.readers import DataError

MAX_OPEN = 64  # files that a corpus keeps open
Stamp = tuple[int, int]  # size of a file, and when it was changed last


class _File:
    """A file read in place: with pread, not a memory map, so that one that shrinks gives a short read, not a signal."""

    def __init__(self, path: str):
        self._descriptor = os.open(path, os.O_RDONLY)

    def pread(self, size: int, offset: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def stamp(self) -> Stamp:
        return _stamp(os.fstat(self._descriptor))

    def close(self, close=os.close) -> None:  # `os` is gone when a corpus lives until the interpreter ends
        close(self._descriptor)


def _stamp(stat: os.stat_result) -> Stamp:
    return stat.st_size, stat.st_mtime_ns


@dataclasses.dataclass
class Corpus:
    """Documents as stretches of texts: document i is bytes start[i]:stop[i] of the one at paths[file[i]].

    A text is a file, or a split of a prepared corpus, whose table of records then stands in `paths`. `names` is what
    messages call it; with # at the end, the number of the document follows.
    """

    paths: list[str]
    file: NDArray[np.int32]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    names: list[str]
    stamps: list[Stamp] = dataclasses.field(default_factory=list, repr=False)  # of the files when they were found
    # Texts that are open, by file, longest unused first.
    _open: dict[int, _File | SplitText] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self):
        if len(self.stamps) != len(self.paths):
            self.stamps = [_stamp(os.stat(path)) for path in self.paths]

    def __len__(self) -> int:
        return len(self.file)

    def __getstate__(self):  # open files do not travel to worker processes
        return {**self.__dict__, "_open": {}}

    def __del__(self):
        for text in self.__dict__.get("_open", {}).values():
            text.close()

    def _text(self, file: int) -> _File | SplitText:
        """The text at paths[file], open; the longest unused of more than MAX_OPEN is closed."""
        text = self._open.pop(file, None)
        if text is None:
            path = self.paths[file]
            split = path.endswith(RECORDS)
            text = SplitText(Path(path).parent, Path(path).name.removesuffix(RECORDS)) if split else _File(path)
            if len(self._open) >= MAX_OPEN:
                self._open.pop(next(iter(self._open))).close()
        self._open[file] = text
        return text

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Bytes of each document."""
        return self.stop - self.start

    @property
    def total_bytes(self) -> int:
        return int(self.lengths.sum())

    def read(self, document: int, begin: int = 0, end: int | None = None) -> bytes:
        """Bytes begin:end of a document. Raises DataError when the file was changed since the corpus was opened."""
        file = int(self.file[document])
        size = int(self.stop[document] - self.start[document])
        end = size if end is None else min(end, size)
        if end <= begin:
            return b""
        offset = int(self.start[document])
        try:
            text = self._text(file)
            data = text.pread(end - begin, offset + begin)
        except OSError as e:
            raise DataError(f"{self.paths[file]}: cannot be read any more: {e}") from None
        if len(data) != end - begin:
            raise DataError(f"{self.paths[file]}: is shorter than when the run began; was it changed?")
        if isinstance(text, _File) and text.stamp() != self.stamps[file]:
            raise DataError(f"{self.paths[file]}: was changed since the run began (its size or time of change)")
        return data

    def select(self, keep: NDArray[np.bool_] | NDArray[np.int64]) -> "Corpus":
        """The documents picked by a mask or by indices."""
        return Corpus(self.paths, self.file[keep], self.start[keep], self.stop[keep], self.names, self.stamps)

    def place(self, document: int) -> tuple[str, int]:
        """What messages call the text that a document is of, and where in it the document begins."""
        file, start = int(self.file[document]), int(self.start[document])
        name, path = self.names[file], self.paths[file]
        if not name.endswith("#"):
            return name, start
        table = path.removesuffix(RECORDS) + DOCUMENTS if path.endswith(RECORDS) else offsets_table(path)
        return f"{name}{np.searchsorted(np.load(table, mmap_mode='r'), start, side='right') - 1}", 0

    def identities(self) -> list[str]:
        """Hashes of the prepared splits among the texts (other files are known by their size and number)."""
        found = [Path(path) for path in self.paths if path.endswith(RECORDS)]
        return [read_manifest(p.parent)["splits"][p.name.removesuffix(RECORDS)]["sha256"] for p in found]

    def describe(self) -> str:
        return f"{len(self):,} document{'s' * (len(self) != 1)}, {self.total_bytes:,} bytes"


def concatenate(parts: list[Corpus]) -> Corpus:
    """Several corpora as one, in order."""
    if len(parts) == 1:
        return parts[0]
    paths: list[str] = []
    names: list[str] = []
    stamps: list[Stamp] = []
    files = []
    for part in parts:
        files.append(part.file + len(paths))
        paths += part.paths
        names += part.names
        stamps += part.stamps
    join = lambda name: np.concatenate([getattr(p, name) for p in parts])  # noqa: E731
    return Corpus(paths, np.concatenate(files).astype(np.int32), join("start"), join("stop"), names, stamps)


def offsets_table(text: str) -> Path:
    """Where the offsets of the documents of a cached copy stand."""
    return Path(text).with_suffix(".offsets.npy")


class PreparedCorpus(Corpus):
    """A split of a prepared corpus: its tables stay on disk, here and in worker processes."""

    def __init__(self, folder: Path, split: str):
        """Raises DataError when it is unfinished, incomplete or damaged."""
        self.folder, self.split = folder, split
        self.described = read_manifest(folder)["splits"][split]
        count = self.described["documents"]
        offsets = load_table(folder / f"{split}{DOCUMENTS}", count + 1)
        file = np.broadcast_to(np.int32(0), count)
        super().__init__([str(folder / f"{split}{RECORDS}")], file, offsets[:-1], offsets[1:], [f"{folder}/{split}#"])
        self._text(0)  # every shard is there

    def __reduce__(self):
        return PreparedCorpus, (self.folder, self.split)

    @property
    def total_bytes(self) -> int:
        return self.described["bytes"]
