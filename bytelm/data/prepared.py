"""A prepared corpus (`bytelm prepare`): ArrayRecord shards, tables of documents and records, and a manifest.

A split is read as one text, all its documents end to end. FOLDER/SPLIT.documents.npy holds the offsets of its documents
in that text (int64, one more than there are documents), FOLDER/SPLIT.records.npy those of its records; a record is a
document or a stretch of one. The tables are memory-mapped, so that a corpus needs no memory to be open.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bytelm.data.readers import DataError

FORMAT = "bytelm-prepared-1"
MANIFEST = "manifest.json"
SPLITS = ("train", "valid")
DOCUMENTS, RECORDS = ".documents.npy", ".records.npy"  # tables of a split
MAX_OPEN = 64  # shards that are kept open


class Shard(NamedTuple):
    """One ArrayRecord file of a split."""

    path: Path
    first: int  # its first record, counted through the split
    end: int  # the record after its last


def is_prepared(path: str | Path) -> bool:
    """Whether a path is the folder of a prepared corpus (or of one that was not finished)."""
    return (Path(path) / MANIFEST).is_file() or (Path(path) / ".parts").is_dir()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared corpus. Raises DataError when it is missing, unfinished, or not one."""
    path = folder / MANIFEST
    if not path.exists() and (folder / ".parts").is_dir():
        raise DataError(f"{folder}: not prepared to the end; run the same bytelm prepare again, it goes on")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}, this version reads {FORMAT!r}")
        for split in (manifest["splits"][name] for name in SPLITS):
            _check_types(split, {"documents": int, "bytes": int, "sha256": str, "shards": list})
            for shard in split["shards"]:
                _check_types(shard, {"file": str, "records": int, "size": int})
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path}: not the manifest of a prepared corpus: {e!r}") from None
    return manifest


def _check_types(record: dict[str, Any], types: dict[str, type]) -> None:
    for name, kind in types.items():
        if type(record[name]) is not kind:
            raise ValueError(f"{name} is {record[name]!r}")


def load_table(path: Path, length: int) -> NDArray[np.int64]:
    """A table of offsets, memory-mapped. Raises DataError when it does not hold `length` rising numbers."""
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise DataError(f"{path}: cannot be read: {e}") from None
    if table.dtype != np.int64 or table.shape != (length,):
        raise DataError(f"{path}: holds {table.dtype}{list(table.shape)}, the manifest says int64[{length}]")
    return table


class SplitText:
    """The text of one split: `pread(size, offset)`, as of a file."""

    def __init__(self, folder: Path, split: str):
        """Raises DataError when a shard is missing or has another size than the manifest says."""
        self.folder, self.split = folder, split
        described = read_manifest(folder)["splits"][split]
        self.shards: list[Shard] = []
        for shard in described["shards"]:
            path, first = folder / shard["file"], self.shards[-1].end if self.shards else 0
            if not path.exists():
                raise DataError(f"{path}: is missing, the manifest lists it")
            if path.stat().st_size != shard["size"]:
                raise DataError(f"{path}: has {path.stat().st_size:,} bytes, the manifest says {shard['size']:,}")
            self.shards.append(Shard(path, first, first + shard["records"]))
        self._firsts = np.array([shard.first for shard in self.shards], np.int64)
        self._records = load_table(folder / f"{split}{RECORDS}", self.shards[-1].end + 1 if self.shards else 1)
        self._open: dict[int, Any] = {}  # shard -> reader, longest unused first

    def pread(self, size: int, offset: int) -> bytes:
        """Bytes offset to offset + size, fewer at the end. Raises DataError naming shard and record."""
        stop = min(offset + size, int(self._records[-1]))
        if stop <= offset:
            return b""
        first = int(np.searchsorted(self._records, offset, side="right")) - 1
        last = int(np.searchsorted(self._records, stop, side="left"))
        joined = b"".join(self._record(i) for i in range(first, last))
        skip = offset - int(self._records[first])
        return joined[skip : skip + stop - offset]

    def _record(self, index: int) -> bytes:
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        shard = self.shards[number]
        try:
            (data,) = self._reader(number).read([index - shard.first])
        except (RuntimeError, ValueError, IndexError) as e:
            raise DataError(f"{shard.path}: record {index - shard.first} cannot be read: {e}") from None
        length = int(self._records[index + 1] - self._records[index])
        if len(data) != length:
            raise DataError(
                f"{shard.path}: record {index - shard.first} has {len(data)} bytes, the table says {length}"
            )
        return data

    def _reader(self, number: int):
        from array_record.python import array_record_module

        reader = self._open.pop(number, None)
        if reader is None:
            reader = array_record_module.ArrayRecordReader(str(self.shards[number].path))
            if len(self._open) >= MAX_OPEN:
                self._close(next(iter(self._open)))
        self._open[number] = reader
        return reader

    def close(self) -> None:
        while self._open:
            self._close(next(iter(self._open)))

    def _close(self, number: int) -> None:
        with contextlib.suppress(RuntimeError):  # of a record that could not be read: it was reported
            self._open.pop(number).close()


def mapped_table(path: Path, length: int, fill: Callable[[NDArray[np.int64]], None]) -> NDArray[np.int64]:
    """A memory-mapped int64 table at `path`, made by `fill` where it does not exist yet."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{np.random.SeedSequence().entropy}.tmp")
        table = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.int64, shape=(length,))
        fill(table)
        table.flush()
        temporary.replace(path)
    return load_table(path, length)
