"""Parts: what `bytelm prepare` makes of each unit of input before it knows the rest.

A part is KEY.docs (its documents end to end), KEY.lengths.npy, KEY.hashes.npy, KEY.errors (records that could not be
read), and, written last, KEY.json. KEY is a hash of all that decides the content.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bytelm.data.jobs import JobDied, run_jobs
from bytelm.data.noise import Draws, noised
from bytelm.data.readers import DataError, RecordError
from bytelm.data.sources import held_rank
from bytelm.data.units import NOISE, PrepareOptions, Source, Unit, read_span, records_before

RESERVED = (0xFE, 0xFF)  # bytes that H-Net keeps for its own symbols; valid UTF-8 has neither


@dataclass(frozen=True)
class PartJob:
    """A unit of input with all that reading it needs."""

    folder: str  # of the parts
    key: str  # of the part: names its files
    sources: tuple[Source, ...]  # of the spans
    unit: Unit
    options: PrepareOptions


def part_job(parts: Path, unit: Unit, sources: list[Source], options: PrepareOptions) -> PartJob:
    mine = tuple(sources[span.source] for span in unit)
    plain = [(source.path, source.size, source.changed, span.begin, span.end) for source, span in zip(mine, unit)]
    names = ("text_field", "records", "reserved", "max_record_bytes", *(NOISE if options.noise else ()))
    read = {name: getattr(options, name) for name in names}
    return PartJob(str(parts), hash_of(plain, read), mine, unit, options)


def hash_of(*things: Any) -> str:
    return hashlib.sha256(json.dumps(things, sort_keys=True).encode()).hexdigest()[:32]


def write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    temporary.replace(path)


def part_path(job: PartJob, suffix: str) -> Path:
    return Path(job.folder) / f"{job.key}{suffix}"


def report_of(job: PartJob) -> dict[str, Any]:
    return json.loads(part_path(job, ".json").read_text(encoding="utf-8"))


def errors_of(job: PartJob, lines_before: dict[str, int] | None = None) -> Iterator[tuple[Source, int, str]]:
    """(file, number of the record within the file, reason) of each record of a part that could not be read.

    `lines_before`: by path, the lines of the file in the parts before this one, to which its own are added; without it
    they are counted in the file itself.
    """
    report = report_of(job)

    @functools.cache
    def before(i: int) -> int:
        source, span = job.sources[i], job.unit[i]
        if lines_before is not None and source.kind == "jsonl":
            return lines_before.get(source.path, 0)
        return records_before(source, span.begin)

    with open(part_path(job, ".errors"), encoding="utf-8") as file:
        for line in file:
            i, index, reason = json.loads(line)
            yield job.sources[i], before(i) + index, reason
    if lines_before is not None:
        for source, span, lines in zip(job.sources, job.unit, report["lines"]):
            if lines is None and source.kind == "jsonl":  # its reader died
                lines = records_before(source, span.end) - records_before(source, span.begin)
            lines_before[source.path] = lines_before.get(source.path, 0) + (lines or 0)


def read_unit(job: PartJob, alone: bool = False, died: bool = False) -> None:
    """Makes the part of a unit. `alone`: each span in a process of its own; `died`: its process did, report that."""
    documents = _DocumentWriter(job)
    try:
        for i, (source, span) in enumerate(zip(job.sources, job.unit)):
            if alone:
                one = dataclasses.replace(job, key=f"{job.key}-{i}", sources=(source,), unit=(span,))
                ((_, outcome),) = run_jobs(read_unit, [one], 1)
                if isinstance(outcome, JobDied):
                    read_unit(one, died=True)
                documents.take(i, one)
            elif died:
                lost = f"{job.unit[i].size:,} bytes of the file are left out"
                documents.refuse(i, 0, f"the process that read it died (a damaged file, or not enough memory); {lost}")
            else:
                for index, text in read_span(source, span, job.options):
                    if text is None:
                        documents.lines[i] = index
                    else:
                        documents.add(i, index, text)
                if _changed(source):
                    raise DataError(f"{source.name}: was changed while it was read; run the command again")
        documents.finish(died)
    finally:
        documents.close()


def _changed(source: Source) -> bool:
    try:
        stat = os.stat(source.path)
    except OSError:
        return True
    return (stat.st_size, stat.st_mtime_ns) != (source.size, source.changed)


def _noised(text: bytes, digest: bytes, options: PrepareOptions) -> bytes:
    """A document under one of the rules of noise, or as it is: what is held out stays clean. What is drawn depends on
    the document and the seed."""
    draws = Draws(options.seed, digest.hex())
    held = held_rank(np.frombuffer(digest, np.uint8)[None])[0] < options.valid_fraction
    if held or draws.uniform(1)[0] >= options.noise_share:
        return text
    rule = options.noise[draws.below(len(options.noise))]
    return noised(text, rule, seed=options.seed, document=digest.hex())


class _DocumentWriter:
    """Writes one part: KEY.docs, .lengths.npy, .hashes.npy, .errors, and KEY.json last of all."""

    def __init__(self, job: PartJob):
        self.job = job
        self._docs = open(part_path(job, ".docs"), "wb")  # noqa: SIM115
        self._errors = open(part_path(job, ".errors"), "w", encoding="utf-8")  # noqa: SIM115
        self.lines: list[int | None] = [None] * len(job.unit)  # of each span, where that is known
        self._died = False
        self._lengths: list[int] = []
        self._hashes: list[bytes] = []
        self._by_source = [{"documents": 0, "bytes": 0, "empty": 0, "unreadable": 0} for _ in job.unit]

    def add(self, source: int, index: int, text: Iterable[bytes] | RecordError) -> None:
        """A record: its text in chunks, or why it cannot be read."""
        begin, digest = self._docs.tell(), hashlib.blake2b(digest_size=16)
        try:
            if isinstance(text, RecordError):
                raise text
            for chunk in text:
                self._check(chunk, self._docs.tell() - begin)
                digest.update(chunk)
                self._docs.write(chunk)
        except RecordError as e:
            self._docs.seek(begin)
            self._docs.truncate()
            self.refuse(source, index, str(e))
            return
        length = self._docs.tell() - begin
        if length and self.job.options.noise:
            length = self._noise(begin, digest.digest())
        counts = self._by_source[source]
        if not length:
            counts["empty"] += 1
            return
        counts["documents"] += 1
        counts["bytes"] += length
        self._lengths.append(length)
        self._hashes.append(digest.digest())

    def _noise(self, begin: int, digest: bytes) -> int:
        """Writes the last document anew, noised: its length. The whole document is in memory for it."""
        self._docs.flush()
        with open(part_path(self.job, ".docs"), "rb") as file:
            file.seek(begin)
            text = _noised(file.read(), digest, self.job.options)
        self._docs.seek(begin)
        self._docs.truncate()
        self._docs.write(text)
        return len(text)

    def _check(self, chunk: bytes, offset: int) -> None:
        if self.job.options.reserved == "error":
            found = [at for byte in RESERVED if (at := chunk.find(byte)) >= 0]
            if found:
                raise RecordError(
                    f"byte 0x{chunk[min(found)]:02X} at offset {offset + min(found)} (never in UTF-8, an H-Net keeps "
                    "it for its own symbols; --reserved keep takes such text for other models)"
                )

    def refuse(self, source: int, index: int, reason: str) -> None:
        """Counts and notes a record that could not be read."""
        self._by_source[source]["unreadable"] += 1
        self._errors.write(json.dumps([source, index, reason]) + "\n")

    def take(self, source: int, other: PartJob) -> None:
        """Adds the part of one span, read elsewhere, and removes it."""
        with open(part_path(other, ".docs"), "rb") as docs:
            shutil.copyfileobj(docs, self._docs)
        with open(part_path(other, ".errors"), encoding="utf-8") as file:
            for line in file:
                _, index, reason = json.loads(line)
                self._errors.write(json.dumps([source, index, reason]) + "\n")
        self._lengths += np.load(part_path(other, ".lengths.npy")).tolist()
        self._hashes += [row.tobytes() for row in np.load(part_path(other, ".hashes.npy"))]
        report = report_of(other)
        self._by_source[source] = report["sources"][0]
        self.lines[source] = report["lines"][0]
        self._died |= report["died"]
        for path in Path(other.folder).glob(f"{other.key}.*"):
            path.unlink()

    def finish(self, died: bool) -> None:
        """`died`: the part is good for this run only; the next one reads the unit again."""
        self.close()
        np.save(part_path(self.job, ".lengths.npy"), np.array(self._lengths, np.int64))
        hashes = np.frombuffer(b"".join(self._hashes), np.uint8).reshape(-1, 16)
        np.save(part_path(self.job, ".hashes.npy"), hashes)
        together = {key: sum(counts[key] for counts in self._by_source) for key in ("documents", "unreadable")}
        write_json(
            part_path(self.job, ".json"),
            {
                "read": sum(span.size for span in self.job.unit),
                **together,
                "sources": self._by_source,
                "lines": self.lines,
                "died": died or self._died,
            },
        )

    def close(self) -> None:
        self._docs.close()
        self._errors.close()
