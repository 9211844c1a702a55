"""Shards: all documents in order, cut into splits, records and ArrayRecord files."""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.data.parts import PartJob, part_path, write_json
from bytelm.data.prepared import DOCUMENTS, RECORDS
from bytelm.data.readers import DataError
from bytelm.data.sources import FEW, held_out
from bytelm.data.units import PrepareOptions

PARTS = ".parts"  # folder of all that is removed at the end


@dataclass(frozen=True)
class Split:
    """One split as planned: its tables are written, its shards are known."""

    split: str
    documents: int
    bytes: int
    shards: tuple[tuple[str, int, int], ...]  # (file, first record, end), records counted through the split
    content: str  # hash of its documents, in order


@dataclass(frozen=True)
class ShardJob:
    """A shard with all that writing it needs."""

    out: str
    parts: tuple[str, ...]  # keys of all parts, in order
    split: str
    file: str
    first: int  # its first record, counted through the split
    end: int
    plan: str  # hash of everything it is made from
    compression: str

    @property
    def path(self) -> Path:
        """Where it is noted that the shard is written, and what it holds."""
        return Path(self.out) / PARTS / f"{self.file}.json"

    def written(self) -> dict[str, Any] | None:
        """What is noted of the shard; None when it is not written yet, or from something else."""
        note = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        return note if note.get("plan") == self.plan and (Path(self.out) / self.file).exists() else None


def plan_splits(out: Path, parts: list[PartJob], options: PrepareOptions) -> tuple[list[Split], int]:
    """Cuts all documents, in order, into splits, records and shards, and writes the tables; (splits, duplicates)."""
    lengths = [np.load(part_path(part, ".lengths.npy")) for part in parts]
    part = np.repeat(np.arange(len(parts), dtype=np.int64), [len(each) for each in lengths])
    offset = np.concatenate([np.cumsum(each) - each for each in lengths])
    length = np.concatenate(lengths)
    hashes = np.concatenate([np.load(part_path(part, ".hashes.npy")) for part in parts])
    every = len(length)
    if options.deduplicate:
        first = _first_of_equals(hashes)
        part, offset, length, hashes = part[first], offset[first], length[first], hashes[first]
    if len(length) < FEW:
        keep = length - (length * options.valid_fraction).astype(np.int64)
        train = _plan_split(out, "train", part, offset, keep, hashes, options)
        valid = _plan_split(out, "valid", part, offset + keep, length - keep, hashes, options)
    else:
        held = held_out(hashes, options.valid_fraction)
        train = _plan_split(out, "train", part[~held], offset[~held], length[~held], hashes[~held], options)
        valid = _plan_split(out, "valid", part[held], offset[held], length[held], hashes[held], options)
    return [train, valid], every - len(length)


def _first_of_equals(hashes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Indices, rising, of the first document of each content."""
    high, low = (hashes[:, k : k + 8].copy().view(np.uint64)[:, 0] for k in (0, 8))
    order = np.lexsort((low, high))  # stable: equal ones stay in their order
    new = np.ones(len(order), bool)
    new[1:] = (high[order][1:] != high[order][:-1]) | (low[order][1:] != low[order][:-1])
    return np.sort(order[new])


def _plan_split(out: Path, split: str, part: NDArray[np.int64], offset: NDArray[np.int64], length: NDArray[np.int64],
                hashes: NDArray[np.uint8], options: PrepareOptions) -> Split:  # fmt: skip
    """`part`, `offset`, `length`: where in the parts the documents of the split stand."""
    some = length > 0
    part, offset, length = part[some], offset[some], length[some]
    documents = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
    pieces = -(-length // options.piece_bytes)
    within = np.arange(int(pieces.sum()), dtype=np.int64) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    records = np.append(np.repeat(documents[:-1], pieces) + within * options.piece_bytes, documents[-1])
    numbers, firsts = np.unique(records[:-1] // options.shard_bytes, return_index=True)
    count = len(numbers)
    ends = [*firsts.tolist()[1:], len(records) - 1]
    shards = tuple(
        (f"{split}-{i:05}-of-{count:05}.array_record", first, end)
        for i, (first, end) in enumerate(zip(firsts.tolist(), ends))
    )
    content = hashlib.sha256(hashes.tobytes() + records.tobytes()).hexdigest()
    _save(out / PARTS / f"{split}.plan.npy", np.stack([part, offset], axis=1))
    _save(out / f"{split}{DOCUMENTS}", documents)
    _save(out / f"{split}{RECORDS}", records.astype(np.int64))
    return Split(split, len(length), int(documents[-1]), shards, content)


def _save(path: Path, table: NDArray[np.int64]) -> None:
    temporary = path.with_name(path.name + ".tmp.npy")
    np.save(temporary, table)
    temporary.replace(path)


def write_shard(job: ShardJob) -> None:
    """Writes the records of one shard, and last of all what is known of it."""
    from array_record.python import array_record_module

    out = Path(job.out)
    plan = np.load(out / PARTS / f"{job.split}.plan.npy", mmap_mode="r")
    documents = np.load(out / f"{job.split}{DOCUMENTS}", mmap_mode="r")
    records = np.load(out / f"{job.split}{RECORDS}", mmap_mode="r")
    level = {"zstd": "zstd:3", "snappy": "snappy", "none": "uncompressed"}[job.compression]
    target, temporary = out / job.file, out / PARTS / f"{job.file}.tmp"
    writer = array_record_module.ArrayRecordWriter(str(temporary), f"group_size:1,{level}")
    document = int(np.searchsorted(documents, records[job.first], side="right")) - 1
    part, file = -1, None
    try:
        for record in range(job.first, job.end):
            begin, end = int(records[record]), int(records[record + 1])
            while begin >= documents[document + 1]:
                document += 1
            number, offset = (int(x) for x in plan[document])
            if number != part:
                if file is not None:
                    file.close()
                part, file = number, open(out / PARTS / f"{job.parts[number]}.docs", "rb")  # noqa: SIM115
            assert file is not None
            data = os.pread(file.fileno(), end - begin, offset + begin - int(documents[document]))
            if len(data) != end - begin:
                raise DataError(f"{file.name}: is shorter than it was; remove {out} and begin again")
            writer.write(data)
        writer.close()
    except RuntimeError as e:  # riegeli's
        raise OSError(f"{temporary} cannot be written: {e}") from None
    finally:
        if writer.is_open():
            with contextlib.suppress(RuntimeError):
                writer.close()
        if file is not None:
            file.close()
    digest = hashlib.sha256()
    with open(temporary, "rb") as written:
        while data := written.read(1 << 20):
            digest.update(data)
    size = temporary.stat().st_size
    temporary.replace(target)
    write_json(job.path, {
        "plan": job.plan, "file": job.file, "records": job.end - job.first, "size": size,
        "bytes": int(records[job.end] - records[job.first]), "sha256": digest.hexdigest(),
    })  # fmt: skip
