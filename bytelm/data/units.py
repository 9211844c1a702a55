"""What `bytelm prepare` reads: input files, cut into units of work, as streams of documents and unreadable records.

How files are cut depends on the files alone, so that any number of workers makes the same parts.
"""

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from bytelm.config import ConfigError, require
from bytelm.data.noise import RULES
from bytelm.data.readers import COMPRESSED, DAMAGED, RecordError, jsonl_text, open_stream
from bytelm.data.sources import BUNDLED, UNREADABLE, expand

UNIT_BYTES = 64 << 20  # of input that one job reads
UNIT_FILES = 2048
CHUNK = 4 << 20  # a text file is read in chunks of this size

Kind = Literal["text", "jsonl", "parquet", "array_record"]
_SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".array_record": "array_record",
    ".arrayrecord": "array_record",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One input file."""

    name: str  # as messages call it
    path: str
    kind: Kind
    size: int
    changed: int  # mtime in ns
    license: str


@dataclass(frozen=True)
class Span:
    """A part of an input file: bytes of a plain jsonl (the lines that start in them), row groups of a parquet file,
    records of an ArrayRecord file; of any other file 0 to 1, all of it."""

    source: int
    begin: int
    end: int  # -1: the end of the file
    size: int  # bytes of the file it stands for, for progress


Unit = tuple[Span, ...]


NOISE = ("noise", "noise_share", "seed")  # options that say nothing where there is no noise


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Makes a folder of sharded ArrayRecord files, with a manifest, that training reads with random access."""

    text_field: str = "text"  # field of a jsonl record, or column of a parquet file, that holds the text
    records: Literal["text", "json"] = "text"  # what a record of an ArrayRecord file is
    on_error: Literal["fail", "skip"] = "fail"  # a record that cannot be read: stop, or leave it out and report it
    reserved: Literal["error", "keep"] = "error"  # documents with bytes FE or FF (never in UTF-8): H-Net has no room
    max_record_bytes: int = 256 << 20  # a jsonl line longer than this is not read
    deduplicate: bool = False  # keep the first of documents with the same content (by a 128-bit hash)
    valid_fraction: float = 0.005  # share of documents held out, by a hash of their content
    shard_bytes: int = 256 << 20  # text in a shard
    piece_bytes: int = 64 << 10  # a longer document is stored as several records
    compression: Literal["zstd", "snappy", "none"] = "zstd"  # of the records
    noise: tuple[str, ...] = ()  # rules (drop, repeat, ...): each document is noised by one of them, drawn evenly;
    # what a hash holds out stays clean (where there are few documents, and their ends are held out, these do not)
    noise_share: float = 1.0  # share of the documents that are noised
    seed: int = 0  # of the noise
    license: tuple[str, ...] = ()  # for the manifest: one for all inputs, or one for each
    workers: int = os.cpu_count() or 1  # processes that read and write; 0 = in this process

    def __post_init__(self):
        for name in ("max_record_bytes", "shard_bytes", "piece_bytes"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        require(0 <= self.valid_fraction < 1, f"--valid-fraction {self.valid_fraction}: must be in [0, 1)")
        require(self.workers >= 0, f"--workers {self.workers}: must not be negative")
        require(0 <= self.noise_share <= 1, f"--noise-share {self.noise_share}: must be in [0, 1]")
        for rule in self.noise:
            require(rule in RULES, f"--noise {rule}: choose {', '.join(RULES)}")


def find_sources(entries: Iterable[str], licenses: list[str]) -> list[Source]:
    """The files that paths and globs name, in sorted order within an entry. Raises ConfigError."""
    sources: list[Source] = []
    for entry, license in zip(entries, licenses):
        for name in expand(entry, "input"):
            path = name
            if name.startswith("bundled:"):
                path = str(resources.files("bytelm") / "data" / "corpus" / BUNDLED[name.removeprefix("bundled:")])
            kind = _kind(Path(path))
            stat = os.stat(path)
            try:
                open(path, "rb").close()
            except OSError as e:
                raise ConfigError(f"{name}: cannot be read: {e.strerror}") from None
            sources.append(Source(name, os.path.realpath(path), kind, stat.st_size, stat.st_mtime_ns, license))
    if any(source.kind == "parquet" for source in sources):
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise ImportError("parquet needs the extra: pip install 'bytelm[data]'") from None
    names = [source.path for source in sources]
    twice = next((name for name, next_name in itertools.pairwise(sorted(names)) if name == next_name), None)
    if twice:
        raise ConfigError(f"{twice}: is named twice by the inputs")
    return sources


def _kind(path: Path) -> Kind:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in COMPRESSED
    inner = suffixes[-2:-1] if packed else suffixes[-1:]
    if inner and inner[0] in UNREADABLE:
        raise ConfigError(f"{path}: {inner[0]} files are not read; give text, jsonl, parquet or ArrayRecord")
    kind = _SUFFIXES.get(inner[0], "text") if inner else "text"
    if packed and kind in ("parquet", "array_record"):
        raise ConfigError(f"{path}: unpack it first ({kind} files are compressed inside)")
    return kind


def cut_units(sources: list[Source]) -> list[Unit]:
    """Units in the order of the documents: stretches of large files, groups of small ones."""
    units: list[Unit] = []
    group: list[Span] = []
    size = 0
    for number, source in enumerate(sources):
        ends = _ends(source)
        if len(ends) == 1 and size + source.size <= UNIT_BYTES and len(group) < UNIT_FILES:
            group.append(Span(number, 0, ends[0], source.size))
            size += source.size
            continue
        if group:
            units.append(tuple(group))
        group, size = [], 0
        if len(ends) == 1:
            group, size = [Span(number, 0, ends[0], source.size)], source.size
        else:
            share = source.size // len(ends)
            units += [(Span(number, begin, end, share),) for begin, end in zip([0, *ends], ends)]
    return [*units, tuple(group)] if group else units


def _ends(source: Source) -> list[int]:
    """Where the spans of a file end."""
    parts = max(-(-source.size // UNIT_BYTES), 1)
    if source.kind == "jsonl" and Path(source.path).suffix.lower() not in COMPRESSED:
        return [min((i + 1) * UNIT_BYTES, source.size) for i in range(parts)]
    if parts == 1 or source.kind not in ("parquet", "array_record"):
        return [1] if source.kind not in ("parquet", "array_record") else [-1]
    try:
        count = (
            _open_parquet(source).num_row_groups if source.kind == "parquet" else _open_records(source).num_records()
        )
    except Exception:  # a damaged file: whoever reads the span says so
        return [-1]
    parts = max(min(parts, count), 1)
    return [count * (i + 1) // parts for i in range(parts)]


def read_span(
    source: Source, span: Span, options: PrepareOptions
) -> Iterator[tuple[int, Iterable[bytes] | RecordError | None]]:
    """(number of the record within the span, its text in chunks or why it cannot be read), in order.

    Iterating over the chunks may raise RecordError too. A blank line is no record, but counts in the numbers; at the
    end of a jsonl span comes (number of its lines, None).
    """
    if source.kind == "text":
        yield 0, _chunks(Path(source.path))
    elif source.kind == "jsonl":
        yield from _jsonl(source, span, options)
    elif source.kind == "parquet":
        yield from _parquet(source, span, options)
    else:
        yield from _array_record(source, span, options)


def records_before(source: Source, begin: int) -> int:
    """How many records stand in front of a span that begins there, so that messages can count from the file's start."""
    if source.kind == "text" or begin == 0:
        return 0
    if source.kind == "array_record":
        return begin
    if source.kind == "parquet":
        metadata = _open_parquet(source).metadata
        return sum(metadata.row_group(i).num_rows for i in range(begin))
    lines, last = 0, b""
    with open(source.path, "rb") as file:
        while begin > 0 and (data := file.read(min(CHUNK, begin))):
            lines, last, begin = lines + data.count(b"\n"), data[-1:], begin - len(data)
    return lines + (last != b"\n")  # a line that began before is of the span before


def _damaged(error: Exception) -> RecordError:
    return RecordError(f"damaged, or not what its name says, from here on: {str(error) or type(error).__name__}")


def _raise_of_disk(error: Exception) -> None:
    """Raises what is wrong with the disk, not with the content: a later try may read the file."""
    if isinstance(error, OSError) and error.errno:
        raise error


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with open_stream(path) as stream:
            while data := stream.read(CHUNK):
                yield data
    except DAMAGED as e:
        _raise_of_disk(e)
        raise _damaged(e) from None


def _jsonl(
    source: Source, span: Span, options: PrepareOptions
) -> Iterator[tuple[int, Iterable[bytes] | RecordError | None]]:
    path, limit, index = Path(source.path), options.max_record_bytes, -1
    packed = path.suffix.lower() in COMPRESSED
    try:
        with open_stream(path) as stream:
            if not packed and span.begin:
                stream.seek(span.begin - 1)
                _skip_line(stream)
            while packed or stream.tell() < span.end:
                line = stream.readline(limit + 1)
                if not line:
                    break
                index += 1
                if len(line) > limit and not line.endswith(b"\n"):
                    _skip_line(stream)
                    yield index, RecordError(f"a line of over {limit:,} bytes (--max-record-bytes)")
                elif line.strip():
                    try:
                        text = jsonl_text(line, options.text_field)
                    except RecordError as e:
                        yield index, e
                    else:
                        yield index, (text,)
    except DAMAGED as e:
        _raise_of_disk(e)
        yield index + 1, _damaged(e)
    yield index + 1, None


def _skip_line(stream: Any) -> None:
    while (data := stream.readline(CHUNK)) and not data.endswith(b"\n"):
        pass


def _open_parquet(source: Source) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(source.path)


def _parquet(
    source: Source, span: Span, options: PrepareOptions
) -> Iterator[tuple[int, Iterable[bytes] | RecordError]]:
    field, first = options.text_field, 0
    try:
        file = _open_parquet(source)
        groups = range(span.begin, file.num_row_groups if span.end < 0 else span.end)
        names = file.schema_arrow.names
        if field not in names:
            raise RecordError(f"no column {field!r} (--text-field); the file has {', '.join(names)[:200]}")
    except RecordError as e:
        yield 0, e
        return
    except Exception as e:  # pyarrow raises many kinds for a damaged file
        _raise_of_disk(e)
        yield 0, _damaged(e)
        return
    for group in groups:
        row = 0
        try:
            for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=[field]):
                for value in _binary(batch.column(0)):
                    yield first + row, value if isinstance(value, RecordError) else (value,)
                    row += 1
        except Exception as e:
            _raise_of_disk(e)
            yield first + row, RecordError(f"row group {group} from its row {row} on: {_damaged(e)}")
        first += file.metadata.row_group(group).num_rows


def _binary(column: Any) -> Iterator[bytes | RecordError]:
    """The values of a column of text as bytes."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    types = pyarrow.types
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    if not (is_text or types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)):
        yield from (RecordError(f"the column holds {kind}, not text") for _ in range(len(column)))
        return
    for value in column.cast(pyarrow.large_binary()).to_pylist():
        if value is None:
            yield RecordError("null instead of text")
            continue
        try:
            if is_text:
                value.decode("utf-8")
            yield value
        except UnicodeDecodeError as e:
            yield RecordError(f"not UTF-8: {e}")


def _open_records(source: Source) -> Any:
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(source.path)
    if not reader.ok():
        reader.close()  # raises what is wrong
    return reader


def _array_record(
    source: Source, span: Span, options: PrepareOptions
) -> Iterator[tuple[int, Iterable[bytes] | RecordError]]:
    try:
        reader = _open_records(source)
        end = reader.num_records() if span.end < 0 else span.end
    except Exception as e:  # riegeli's errors come as RuntimeError, ValueError and others
        yield 0, _damaged(e)
        return
    number, in_order = span.begin, True  # in order is fast; after damage every record is asked for by its number
    while number < end:
        try:
            if in_order:
                if number == span.begin:
                    reader.seek(number)
                record = reader.read()
            else:
                (record,) = reader.read([number])
            text = jsonl_text(record, options.text_field) if options.records == "json" else record
            yield number - span.begin, (text,)
        except RecordError as e:
            yield number - span.begin, e
        except Exception as e:
            if in_order:
                in_order, reader = False, _open_records(source)
                continue
            yield number - span.begin, RecordError(f"cannot be read: {e}")
        number += 1
    with contextlib.suppress(RuntimeError):  # of a record that could not be read: it was reported
        reader.close()
