"""Text on disk as documents: plain files, jsonl, compressed forms of both, and the bundled corpus.

A corpus is a list of stretches of files, read where they lie, so that its size is not bounded by memory. What cannot be
read as it stands (jsonl, .gz, .zst, .xz) is written once, decompressed, to a cache folder.
"""

import dataclasses
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bytelm.config import ConfigError

BUNDLED = {"shakespeare": "tinyshakespeare.txt.xz"}
_UNREADABLE = {".parquet", ".arrow", ".array_record", ".arrayrecord", ".zip", ".tar", ".bz2", ".pdf", ".docx"}


MAX_OPEN = 64  # files that a corpus keeps open


class DataError(ValueError):
    """Text that cannot be read; the message names file and place, and is shown without a traceback."""


@dataclasses.dataclass
class Corpus:
    """Documents as stretches of files: document i is bytes start[i]:stop[i] of paths[file[i]]."""

    paths: list[str]
    file: NDArray[np.int32]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    _open: dict[int, int] = dataclasses.field(default_factory=dict, repr=False)  # file -> descriptor, oldest first

    def __len__(self) -> int:
        return len(self.file)

    def __getstate__(self):  # descriptors do not travel to worker processes
        return {**self.__dict__, "_open": {}}

    def __del__(self):
        for descriptor in self._open.values():
            os.close(descriptor)

    def _descriptor(self, file: int) -> int:
        """An open descriptor of paths[file]; the longest unused of more than MAX_OPEN is closed."""
        descriptor = self._open.pop(file, None)
        if descriptor is None:
            descriptor = os.open(self.paths[file], os.O_RDONLY)
            if len(self._open) >= MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
        self._open[file] = descriptor
        return descriptor

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Bytes of each document."""
        return self.stop - self.start

    @property
    def total_bytes(self) -> int:
        return int(self.lengths.sum())

    def read(self, document: int, begin: int = 0, end: int | None = None) -> bytes:
        """Bytes begin:end of a document. Raises DataError when the file no longer holds them."""
        file = int(self.file[document])
        size = int(self.stop[document] - self.start[document])
        end = size if end is None else min(end, size)
        if end <= begin:
            return b""
        offset = int(self.start[document])
        try:  # pread, not a memory map: a file that shrinks gives a short read, not a bus error
            data = os.pread(self._descriptor(file), end - begin, offset + begin)
        except OSError as e:
            raise DataError(f"{self.paths[file]}: cannot be read any more: {e}") from None
        if len(data) != end - begin:
            raise DataError(f"{self.paths[file]}: is shorter than when the run began; was it changed?")
        return data

    def select(self, keep: NDArray[np.bool_] | NDArray[np.int64]) -> "Corpus":
        """The documents picked by a mask or by indices."""
        return Corpus(self.paths, self.file[keep], self.start[keep], self.stop[keep])

    def describe(self) -> str:
        return f"{len(self):,} document{'s' * (len(self) != 1)}, {self.total_bytes:,} bytes"


def cache_folder(cache_dir: str) -> Path:
    """The folder for decompressed text (and other derived files)."""
    root = (
        Path(cache_dir).expanduser() if cache_dir else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    )
    return root if cache_dir else root / "bytelm"


def _split_slice(entry: str) -> tuple[str, slice]:
    match = re.fullmatch(r"(.*)\[(\d*):(\d*)\]", entry, re.DOTALL)
    if not match or os.path.exists(entry):
        return entry, slice(None)
    start, stop = (int(s) if s else None for s in match.groups()[1:])
    return match[1], slice(start, stop)


def _expand(entry: str, where: str) -> tuple[list[str], slice]:
    """Files that an entry names, and the slice to take of each."""
    pattern, part = _split_slice(entry)
    if pattern.startswith("bundled:"):
        name = pattern.removeprefix("bundled:")
        if name not in BUNDLED:
            raise ConfigError(f"{where}: no bundled corpus {name!r}; there is {', '.join(BUNDLED)}")
        return [pattern], part
    pattern = os.path.expanduser(pattern)
    files = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    files = [f for f in files if os.path.isfile(f)]
    if not files:
        hint = " (it is a folder: write FOLDER/*.txt or FOLDER/**/*.jsonl)" if os.path.isdir(pattern) else ""
        raise ConfigError(f"{where}: {pattern!r} matches no file{hint}")
    if part != slice(None) and len(files) > 1:
        raise ConfigError(f"{where}: {entry!r} takes a slice of {len(files)} files; a slice needs exactly one")
    return files, part


def open_corpus(
    entries: tuple[str, ...], *, text_field: str = "text", cache_dir: str = "", where: str = "data.train"
) -> Corpus:
    """Opens files and globs as one corpus, in sorted order.

    A .jsonl record is a document (its `text_field`); any other file is one. `FILE[a:b]` takes bytes a to b of a text
    file or records a to b of a jsonl file. `bundled:shakespeare` is the text inside the package. Empty documents are
    left out. Raises ConfigError when nothing matches or nothing is left, DataError when a file cannot be read.
    """
    corpus = concatenate([_open_entry(entry, text_field, cache_dir, where) for entry in entries])
    if len(corpus) == 0:
        raise ConfigError(f"{where}: {', '.join(entries)} hold no text (every file or record is empty)")
    return corpus


def concatenate(parts: list[Corpus]) -> Corpus:
    """Several corpora as one, in order."""
    paths: list[str] = []
    files = []
    for part in parts:
        files.append(part.file + len(paths))
        paths += part.paths
    join = lambda name: np.concatenate([getattr(p, name) for p in parts])  # noqa: E731
    return Corpus(paths, np.concatenate(files).astype(np.int32), join("start"), join("stop"))


def _open_entry(entry: str, text_field: str, cache_dir: str, where: str) -> Corpus:
    files, part = _expand(entry, where)
    corpora = [_open_file(f, part, text_field, cache_dir, where) for f in files]
    joined = concatenate(corpora)
    return joined.select(joined.lengths > 0)


def _open_file(path: str, part: slice, text_field: str, cache_dir: str, where: str) -> Corpus:
    suffixes = [s.lower() for s in Path(path).suffixes]
    if suffixes and suffixes[-1] in _UNREADABLE:
        raise ConfigError(
            f"{where}: {path}: {suffixes[-1]} files are not read; give text, .jsonl, or .gz/.zst/.xz of them"
        )
    packed = suffixes[-1] if suffixes and suffixes[-1] in (".gz", ".zst", ".xz") else ""
    inner = suffixes[:-1] if packed else suffixes
    is_jsonl = bool(inner) and inner[-1] in (".jsonl", ".ndjson")
    if path.startswith("bundled:") or packed or is_jsonl:
        path, offsets = _spool(path, is_jsonl, text_field, cache_dir)
    else:
        path = os.path.abspath(path)
        offsets = np.array([0, os.path.getsize(path)], np.int64)
    start, stop = offsets[:-1], offsets[1:]
    if is_jsonl:
        start, stop = start[part], stop[part]
    elif part != slice(None):
        low, high, _ = part.indices(int(stop[0]))
        if part.start is not None and part.start > stop[0]:
            raise ConfigError(f"{where}: {path} has {stop[0]:,} bytes; a slice cannot start at {part.start:,}")
        start, stop = np.array([low], np.int64), np.array([max(low, high)], np.int64)
    return Corpus([path], np.zeros(len(start), np.int32), start, stop)


def _spool(path: str, is_jsonl: bool, text_field: str, cache_dir: str) -> tuple[str, NDArray[np.int64]]:
    """The decompressed documents of a file, end to end in one cache file, and their offsets; made once."""
    bundled = path.startswith("bundled:")
    if bundled:
        source = Path(str(resources.files("bytelm") / "data" / "corpus" / BUNDLED[path.removeprefix("bundled:")]))
    else:
        source = Path(path)
    stat = source.stat()
    state = (str(source.resolve()), stat.st_size, stat.st_mtime_ns, text_field if is_jsonl else None)
    folder = cache_folder(cache_dir) / "text"
    target = folder / f"{source.name.split('.')[0]}-{hashlib.sha256(repr(state).encode()).hexdigest()[:16]}.bytes"
    index = target.with_suffix(".offsets.npy")
    if not (target.exists() and index.exists()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if is_jsonl:
                print(f"[data] reading {path} once into {target}", file=sys.stderr, flush=True)
            _write_spool(source, target, index, is_jsonl, text_field)
        except OSError as e:
            raise DataError(
                f"{path}: cannot be unpacked into {folder}: {e} (data.cache_dir names another place)"
            ) from None
    return str(target), np.load(index)


def _write_spool(source: Path, target: Path, index: Path, is_jsonl: bool, text_field: str) -> None:
    offsets = [0]
    handle, temporary = tempfile.mkstemp(dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            for document in _jsonl_texts(source, text_field) if is_jsonl else _reading(source):
                out.write(document)
                offsets.append(out.tell())
        if not is_jsonl:
            offsets = [0, offsets[-1]]
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as table:
            np.save(table, np.array(offsets, np.int64))
        os.replace(table.name, index)
        os.replace(temporary, target)  # last: a target that exists is whole
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _open_stream(source: Path):
    suffix = source.suffix.lower()
    if suffix == ".gz":
        return gzip.open(source, "rb")
    if suffix == ".xz":
        return lzma.open(source, "rb")
    if suffix == ".zst":
        import zstandard

        return io.BufferedReader(zstandard.open(source, "rb"))
    return open(source, "rb")


def _reading(source: Path) -> Iterator[bytes]:
    """Lines of a possibly compressed file; a damaged one raises DataError."""
    import zstandard

    try:
        with _open_stream(source) as stream:
            yield from stream
    except (gzip.BadGzipFile, EOFError, lzma.LZMAError, zstandard.ZstdError, zlib.error) as e:
        raise DataError(f"{source}: damaged or not what its name says: {e}") from None


def _jsonl_texts(source: Path, text_field: str) -> Iterator[bytes]:
    for number, line in enumerate(_reading(source), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:  # also bad UTF-8, and numbers or nesting beyond Python's limits
            raise DataError(f"{source}:{number}: not a JSON record: {e}") from None
        text = record.get(text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{source}:{number}: no string field {text_field!r} (data.text_field); the record has {keys}"
            )
        try:
            yield text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise DataError(f"{source}:{number}: character {e.start} of {text_field!r} is a lone surrogate") from None


def split_validation(corpus: Corpus, fraction: float) -> tuple[Corpus, Corpus]:
    """Splits off validation text: (train, validation).

    Documents go by a hash of their content, so that the split does not depend on order or file names. With fewer than
    20 documents that would be a lottery: then the last `fraction` of each document is held out instead.
    """
    if len(corpus) < 20:
        cut = corpus.stop - np.maximum((corpus.lengths * fraction).astype(np.int64), 0)
        train = Corpus(corpus.paths, corpus.file, corpus.start, cut)
        valid = Corpus(corpus.paths, corpus.file, cut, corpus.stop)
        return train.select(train.lengths > 0), valid.select(valid.lengths > 0)
    digests = [hashlib.blake2b(corpus.read(i), digest_size=8).digest() for i in range(len(corpus))]
    rank = np.array([int.from_bytes(d, "big") for d in digests], np.float64) / 2**64
    held = rank < fraction
    if fraction > 0 and not held.any():  # few documents: the luck of the draw must not leave nothing held out
        held = rank == rank.min()
    return corpus.select(~held), corpus.select(held)
