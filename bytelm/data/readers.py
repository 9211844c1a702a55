"""Reading files that may be compressed or damaged: for the pipeline, and for `bytelm prepare`."""

import bz2
import gzip
import io
import json
import lzma
import zlib
from pathlib import Path
from typing import Any

import zstandard

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
# What the decompressors raise for a file that is damaged, cut off, or not what its name says.
DAMAGED = (gzip.BadGzipFile, EOFError, lzma.LZMAError, zstandard.ZstdError, zlib.error, OSError)


class _Zstd(io.RawIOBase):
    """A .zst file, all its frames. Unlike zstandard's own reader it raises EOFError for one that is cut off."""

    def __init__(self, path: Path):
        self._file = open(path, "rb")  # noqa: SIM115 (closed below)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input, self._output = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            data = self._input or self._file.read(1 << 16)
            if not data and self._frame is not None:
                raise EOFError("ends in the middle of a frame")
            if not data:
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            self._output, self._input = self._frame.decompress(data), b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


class DataError(ValueError):
    """Text that cannot be read; the message names file and place, and is shown without a traceback."""


class RecordError(ValueError):
    """One record that cannot be read; the message says why."""


def open_stream(path: Path) -> io.BufferedIOBase:
    """A file opened for reading, decompressed by its suffix. Reading it may raise one of DAMAGED."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix == ".xz":
        return lzma.open(path, "rb")
    if suffix == ".bz2":
        return bz2.open(path, "rb")
    if suffix == ".zst":
        return io.BufferedReader(_Zstd(path))
    return open(path, "rb")


def jsonl_text(line: bytes, text_field: str) -> bytes:
    """The text of one line of a jsonl file. Raises RecordError."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError, MemoryError) as e:  # also bad UTF-8, and numbers beyond Python's limits
        raise RecordError(f"not a JSON record: {e}") from None
    return field_text(record, text_field)


def field_text(record: Any, text_field: str) -> bytes:
    """The UTF-8 text of a record's field. Raises RecordError."""
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise RecordError(f"no string field {text_field!r} (data.text_field); the record has {keys[:200]}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise RecordError(f"character {e.start} of {text_field!r} is a lone surrogate") from None
