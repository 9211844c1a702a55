"""`bytelm prepare`: any mix of text, jsonl, parquet and ArrayRecord files -> a prepared corpus (data/prepared.py).

Three passes, each of jobs that are done or not done, so that a killed run goes on: every unit of input becomes a part
(data/parts.py); all documents, in order and without duplicates, are cut into splits, records and shards; every shard is
written (data/shards.py). What comes out depends on the input and the options alone, not on workers or interruptions.

Memory: about 150 bytes for each document and 50 for each further record of a long one. Disk: the text twice, until the
parts are removed at the end.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bytelm.config import ConfigError, require
from bytelm.data.jobs import JobDied, run_jobs
from bytelm.data.parts import PartJob, errors_of, hash_of, part_job, part_path, read_unit, report_of, write_json
from bytelm.data.prepared import FORMAT, MANIFEST, is_prepared, read_manifest
from bytelm.data.readers import DataError
from bytelm.data.shards import PARTS, ShardJob, Split, plan_splits, write_shard
from bytelm.data.units import NOISE, PrepareOptions, Source, cut_units, find_sources

ERRORS = "errors.jsonl"


@dataclass(frozen=True)
class Progress:
    """How far a preparation is, for whoever shows it."""

    phase: Literal["reading", "writing"]
    done: int  # bytes of input read, or of text written
    total: int
    documents: int
    unreadable: int


def prepare(out: Path, inputs: Iterable[str], options: PrepareOptions,
            show: Callable[[Progress], None] = lambda _: None) -> dict[str, Any]:  # fmt: skip
    """Prepares `inputs` (paths, globs) into the folder `out`; returns the manifest.

    Goes on where a run with the same inputs and options was stopped, and does nothing when it is done. Raises
    ConfigError for options and inputs that cannot be, DataError for a record that cannot be read (on_error="fail").
    """
    entries = list(inputs)
    licenses = _licenses(entries, options.license)
    sources = find_sources(entries, licenses)
    require(bool(sources), "name at least one input: a file or a glob")
    without = ("workers", "on_error", "license", *(() if options.noise else NOISE))
    settings = {k: v for k, v in dataclasses.asdict(options).items() if k not in without}
    with _own(out), _said(out):
        inside = str(out.resolve()) + os.sep  # what an earlier run made there is no input
        sources = [source for source in sources if not source.path.startswith(inside)]
        require(bool(sources), f"every input lies in the output folder {out}")
        identity = hash_of(FORMAT, settings, [(s.path, s.kind, s.size, s.changed, s.license) for s in sources])
        finished = _finished(out, identity)
        if finished is not None:
            shutil.rmtree(out / PARTS, ignore_errors=True)
            return finished
        (out / PARTS).mkdir(exist_ok=True)
        parts = [part_job(out / PARTS, unit, sources, options) for unit in cut_units(sources)]
        _read_all(parts, options.on_error, options.workers, show)
        counts = _count(sources, parts)
        if not any(count["documents"] for count in counts.values()):
            raise DataError("the inputs hold no text" + "".join(f"; {reason}" for reason in _first_error(parts)))
        splits, duplicates = plan_splits(out, parts, options)
        described = _write_all(out, parts, splits, options.compression, settings, options.workers, show)
        _write_errors(out / ERRORS, parts)
        total = {name: sum(count[name] for count in counts.values()) for name in ("documents", "empty", "unreadable")}
        manifest = {
            "format": FORMAT, "identity": identity, "options": settings, **total, "duplicates": duplicates,
            "sources": [{"file": s.name, "license": s.license, "size": s.size, **counts[s.path]} for s in sources],
            "splits": described,
        }  # fmt: skip
        write_json(out / MANIFEST, manifest)
        shutil.rmtree(out / PARTS, ignore_errors=True)
        return manifest


def _licenses(entries: list[str], given: tuple[str, ...]) -> list[str]:
    if len(given) not in (0, 1, len(entries)):
        raise ConfigError(f"--license: {len(given)} for {len(entries)} inputs: give one for all, or one for each")
    return list(given) if len(given) == len(entries) else [given[0] if given else ""] * len(entries)


@contextlib.contextmanager
def _own(out: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not is_prepared(out) and any(p.name != ".lock" for p in out.iterdir()):
            raise ConfigError(f"{out}: is not empty, and is no prepared corpus; name a new folder")
        lock = open(out / ".lock", "a")  # noqa: SIM115 (closed below)
    except OSError as e:
        raise ConfigError(f"{out}: cannot be written: {e}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{out}: another process is preparing it") from None
        yield


@contextlib.contextmanager
def _said(out: Path) -> Iterator[None]:
    """What is wrong with a disk as one message."""
    try:
        yield
    except OSError as e:
        raise DataError(f"{out}: {e}. Once that is mended, the same command goes on from here") from None


def _finished(out: Path, identity: str) -> dict[str, Any] | None:
    if not (out / MANIFEST).exists():
        return None
    manifest = read_manifest(out)
    if manifest.get("identity") != identity:
        raise ConfigError(f"{out}: holds a corpus prepared from other inputs or with other options; name a new folder")
    return manifest


def _read_all(
    parts: list[PartJob], on_error: Literal["fail", "skip"], workers: int, show: Callable[[Progress], None]
) -> None:
    """Makes every part that is not there yet. Raises DataError at an unreadable record unless such are skipped."""
    total = sum(span.size for part in parts for span in part.unit)
    read = documents = unreadable = 0

    def add(part: PartJob) -> None:
        nonlocal read, documents, unreadable
        report = report_of(part)
        read, documents = read + report["read"], documents + report["documents"]
        unreadable += report["unreadable"]
        if unreadable and on_error == "fail":
            raise DataError(
                f"{_first_error([part])[0]}. Mend it, or leave such records out and have them reported with "
                "--on-error skip (what was read so far is kept)"
            )
        show(Progress("reading", read, total, documents, unreadable))

    left = []
    for part in parts:
        if part_path(part, ".json").exists() and not report_of(part)["died"]:
            add(part)
        else:
            left.append(part)
    for part, outcome in run_jobs(read_unit, left, workers):
        if isinstance(outcome, JobDied):  # of several files one is to blame, the others are good
            read_unit(part, alone=len(part.unit) > 1, died=len(part.unit) == 1)
        add(part)


def _first_error(parts: list[PartJob]) -> list[str]:
    """The first record that could not be read, as text; nothing when there is none."""
    for part in parts:
        for source, index, reason in errors_of(part):
            return [f"{source.name}: record {index} cannot be read: {reason}"]
    return []


def _count(sources: list[Source], parts: list[PartJob]) -> dict[str, dict[str, int]]:
    """Documents, bytes, empty and unreadable records of each input file, by path."""
    counts = {source.path: dict.fromkeys(("documents", "bytes", "empty", "unreadable"), 0) for source in sources}
    for part in parts:
        for source, seen in zip(part.sources, report_of(part)["sources"]):
            for name, count in seen.items():
                counts[source.path][name] += count
    return counts


def _write_all(out: Path, parts: list[PartJob], splits: list[Split], compression: str, settings: dict[str, Any],
               workers: int, show: Callable[[Progress], None]) -> dict[str, Any]:  # fmt: skip
    """Writes every shard that is not there yet; returns what the manifest says of the splits."""
    keys = tuple(part.key for part in parts)
    jobs = {
        file: ShardJob(str(out), keys, s.split, file, first, end, hash_of(keys, settings, file, s.content), compression)
        for s in splits
        for file, first, end in s.shards
    }
    for stale in out.glob("*.array_record"):
        if stale.name not in jobs:
            stale.unlink()
    documents, total = sum(split.documents for split in splits), sum(split.bytes for split in splits)
    notes = {file: note for file, job in jobs.items() if (note := job.written())}
    for job, outcome in run_jobs(write_shard, [job for file, job in jobs.items() if file not in notes], workers):
        if isinstance(outcome, JobDied):
            raise DataError(f"{job.file}: the process that wrote it died (not enough memory?); run the command again")
        notes[job.file] = job.written() or {}
        show(Progress("writing", sum(note["bytes"] for note in notes.values()), total, documents, 0))
    described = {}
    for split in splits:
        shards = [{k: v for k, v in notes[file].items() if k != "plan"} for file, _, _ in split.shards]
        described[split.split] = {
            "documents": split.documents, "bytes": split.bytes, "shards": shards,
            "sha256": hash_of([shard["sha256"] for shard in shards], split.documents),
        }  # fmt: skip
    return described


def _write_errors(path: Path, parts: list[PartJob]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    lines_before: dict[str, int] = {}
    with open(temporary, "w", encoding="utf-8") as file:
        for part in parts:
            for source, index, reason in errors_of(part, lines_before):
                file.write(json.dumps({"file": source.name, "index": index, "reason": reason}) + "\n")
    temporary.replace(path)
