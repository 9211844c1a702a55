"""Text on disk as documents: plain files, jsonl, compressed forms of both, and the bundled corpus.

A corpus is a list of stretches of files, read where they lie, so that its size is not bounded by memory. What cannot be
read as it stands (jsonl, .gz, .zst, .xz, .bz2) is written once, decompressed, to a cache folder.
"""

import fcntl
import glob
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bytelm.config import ConfigError
from bytelm.data.corpus import Corpus, PreparedCorpus, concatenate, offsets_table
from bytelm.data.prepared import is_prepared
from bytelm.data.readers import COMPRESSED, DAMAGED, DataError, RecordError, jsonl_text, open_stream

FEW = 20  # documents; with fewer, the end of each is held out
BUNDLED = {"shakespeare": "tinyshakespeare.txt.xz"}
TO_PREPARE = (".parquet", ".array_record", ".arrayrecord")
UNREADABLE = (".arrow", ".zip", ".tar", ".pdf", ".docx")


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


def expand(pattern: str, where: str) -> list[str]:
    """Files that a path or glob names, sorted, or a bundled corpus. Raises ConfigError when there are none."""
    if pattern.startswith("bundled:"):
        name = pattern.removeprefix("bundled:")
        if name not in BUNDLED:
            raise ConfigError(f"{where}: no bundled corpus {name!r}; there is {', '.join(BUNDLED)}")
        return [pattern]
    pattern = os.path.expanduser(pattern)
    found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    other = next((name for name in found if not os.path.isfile(name) and not os.path.isdir(name)), None)
    if other is not None:
        raise ConfigError(f"{where}: {other} is no file (a broken link?)")
    files = [name for name in found if os.path.isfile(name)]
    if not files:
        hint = " (it is a folder: write FOLDER/*.txt or FOLDER/**/*.jsonl)" if os.path.isdir(pattern) else ""
        raise ConfigError(f"{where}: {pattern!r} matches no file{hint}")
    return files


def open_corpus(
    entries: tuple[str, ...], *, text_field: str = "text", cache_dir: str = "", where: str = "data.train"
) -> Corpus:
    """Opens files and globs as one corpus, in sorted order.

    A .jsonl record is a document (its `text_field`); any other file is one. `FILE[a:b]` takes bytes a to b of a text
    file or records a to b of a jsonl file. `bundled:shakespeare` is the text inside the package. Of a folder made by
    `bytelm prepare`, the training split is taken for data.train, else its validation split. Empty documents are left
    out. Raises ConfigError when nothing matches or nothing is left, DataError when a file cannot be read.
    """
    corpus = concatenate([_open_entry(entry, text_field, cache_dir, where) for entry in entries])
    if len(corpus) == 0:
        raise ConfigError(f"{where}: {', '.join(entries)} hold no text (every file or record is empty)")
    return corpus


def _open_entry(entry: str, text_field: str, cache_dir: str, where: str) -> Corpus:
    folder = Path(entry).expanduser()
    if is_prepared(folder):
        corpus = PreparedCorpus(folder, "train" if where == "data.train" else "valid")
        if len(corpus) == 0:
            raise ConfigError(f"{where}: the {corpus.split} split of {folder} is empty")
        return corpus
    pattern, part = _split_slice(entry)
    files = expand(pattern, where)
    if part != slice(None) and len(files) > 1:
        raise ConfigError(f"{where}: {entry!r} takes a slice of {len(files)} files; a slice needs exactly one")
    corpora = [_open_file(f, part, text_field, cache_dir, where) for f in files]
    joined = concatenate(corpora)
    return joined.select(joined.lengths > 0)


def _open_file(path: str, part: slice, text_field: str, cache_dir: str, where: str) -> Corpus:
    suffixes = [s.lower() for s in Path(path).suffixes]
    if suffixes and suffixes[-1] in TO_PREPARE:
        raise ConfigError(f"{where}: {path}: {suffixes[-1]} is read by bytelm prepare; then give the folder it made")
    if suffixes and suffixes[-1] in UNREADABLE:
        raise ConfigError(
            f"{where}: {path}: {suffixes[-1]} files are not read; give text, .jsonl, .gz/.zst/.xz/.bz2 of them, or a "
            "folder made by bytelm prepare"
        )
    packed = suffixes[-1] if suffixes and suffixes[-1] in COMPRESSED else ""
    inner = suffixes[:-1] if packed else suffixes
    is_jsonl = bool(inner) and inner[-1] in (".jsonl", ".ndjson")
    name = path + "#" * is_jsonl
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
    return Corpus([path], np.zeros(len(start), np.int32), start, stop, [name])


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
    index = offsets_table(str(target))
    if not (target.exists() and index.exists()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(target.with_suffix(".lock"), "w") as lock:  # several processes want it: one makes it
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not (target.exists() and index.exists()):
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
            for document in _jsonl_texts(source, text_field) if is_jsonl else _lines(source):
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


def _lines(source: Path) -> Iterator[bytes]:
    """Lines of a possibly compressed file; a damaged one raises DataError."""
    try:
        with open_stream(source) as stream:
            yield from stream
    except DAMAGED as e:
        if isinstance(e, OSError) and e.errno:  # of the disk, not of the content
            raise
        raise DataError(f"{source}: damaged or not what its name says: {e}") from None


def _jsonl_texts(source: Path, text_field: str) -> Iterator[bytes]:
    for number, line in enumerate(_lines(source), 1):
        if line.strip():
            try:
                yield jsonl_text(line, text_field)
            except RecordError as e:
                raise DataError(f"{source}:{number}: {e}") from None


def content_hash(data: bytes) -> bytes:
    """What decides whether a document is held out, and whether two are the same: 16 bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


def held_rank(hashes: NDArray[np.uint8]) -> NDArray[np.float64]:
    """A number in [0, 1) of each document, given their hashes [n, 16]: those below the fraction are held out."""
    return hashes[:, :8].copy().view(">u8")[:, 0] / 2.0**64


def held_out(hashes: NDArray[np.uint8], fraction: float) -> NDArray[np.bool_]:
    """Which documents, given their hashes [n, 16], are validation text: a share of `fraction`, at least one."""
    rank = held_rank(hashes)
    held = rank < fraction
    if fraction > 0 and not held.any():  # few documents: the luck of the draw must not leave nothing held out
        held = rank == rank.min()
    return held


def split_validation(corpus: Corpus, fraction: float) -> tuple[Corpus, Corpus]:
    """Splits off validation text: (train, validation).

    Documents go by a hash of their content, so that the split does not depend on order or file names. With fewer than
    FEW documents that would be a lottery: then the last `fraction` of each document is held out instead.
    """
    if len(corpus) < FEW:
        cut = corpus.stop - (corpus.lengths * fraction).astype(np.int64)
        train = Corpus(corpus.paths, corpus.file, corpus.start, cut, corpus.names, corpus.stamps)
        valid = Corpus(corpus.paths, corpus.file, cut, corpus.stop, corpus.names, corpus.stamps)
        return train.select(train.lengths > 0), valid.select(valid.lengths > 0)
    hashes = np.frombuffer(b"".join(content_hash(corpus.read(i)) for i in range(len(corpus))), np.uint8).reshape(-1, 16)
    held = held_out(hashes, fraction)
    return corpus.select(~held), corpus.select(held)
