"""What `bytelm prepare` does about input, disks and processes that fail."""

import dataclasses
import gzip
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter

import pytest
import zstandard
from array_record.python import array_record_module
from prepare_helpers import HERE, SKIP, command, errors, files_of, jsonl, prepared, write_parquet, write_records

from bytelm.data import parts, shards, units
from bytelm.data.jobs import JobDied, run_jobs
from bytelm.data.prepare import prepare
from bytelm.data.readers import DataError


@pytest.mark.parametrize(
    "name,content,found",
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n{"text": "b"}\n', [(2, "not a JSON record")]),
        ("u.jsonl", b'{"text": "\xff"}\n{"text": "b"}', [(0, "not a JSON record.*utf-8")]),
        ("f.jsonl", b'{"txt": "a"}\n[1]\n{"text": 3}\n{"text": null}', [(i, "no string field") for i in range(4)]),
        ("s.jsonl", b'{"text": "\\ud800"}', [(0, "lone surrogate")]),
        ("deep.jsonl", b"[" * 3000 + b'\n{"text": "b"}', [(0, "not a JSON record")]),
        ("long.jsonl", b'{"text": "' + b"x" * 5000 + b'"}\n{"text": "b"}', [(0, "a line of over 4,000 bytes")]),
        ("cut.jsonl.gz", gzip.compress(jsonl("a", "b", "c"), mtime=0)[:-9], [(3, "damaged")]),
        ("no.jsonl.gz", b"plain", [(0, "damaged, or not what its name says")]),
        ("no.txt.zst", b"plain", [(0, "damaged")]),
        ("cut.txt.zst", zstandard.compress(bytes(range(250)) * 9)[:-4], [(0, "damaged.*in the middle of")]),
        ("cut.jsonl.zst", zstandard.compress(jsonl("a", "b", "c") * 1)[:-3], [(0, "damaged")]),
        ("cut.txt.xz", lzma.compress(b"x" * 1000)[:-20], [(0, "damaged")]),
        ("no.txt.bz2", b"plain", [(0, "damaged")]),
        ("h.txt", b"good until \xfe here", [(0, "byte 0xFE at offset 11")]),
        ("no.parquet", b"PAR1 nothing PAR1", [(0, "damaged")]),
        ("no.array_record", b"nothing at all" * 9, [(0, "damaged")]),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_counted_and_said(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "z.jsonl").write_bytes(jsonl("good"))
    inputs = [f"{tmp_path}/{name}", f"{tmp_path}/z.jsonl"]
    with pytest.raises(DataError, match=rf"{name}: record {found[0][0]} cannot be read: .*(?s:.*)--on-error skip"):
        prepare(tmp_path / "out", inputs, dataclasses.replace(HERE, max_record_bytes=4000))
    manifest = prepare(tmp_path / "out", inputs, dataclasses.replace(SKIP, max_record_bytes=4000))
    assert manifest["unreadable"] == len(found) == manifest["sources"][0]["unreadable"]
    for (file, index, reason), (wanted, message) in zip(errors(tmp_path / "out"), found, strict=True):
        assert file == name and index == wanted
        assert re.search(message, reason), reason
    good = [b"a"] * (name[0] == "a") + [b"b"] * (name[:2] in ("a.", "u.", "de", "lo"))
    assert prepared(tmp_path / "out") == [*([b"a", b"b", b"c"] if name == "cut.jsonl.gz" else good), b"good"]


def test_an_input_that_changes_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"before")
    real = parts.read_span

    def changing(source, span, options):
        yield from real(source, span, options)
        path.write_bytes(b"after!")

    monkeypatch.setattr(parts, "read_span", changing)
    with pytest.raises(DataError, match=r"a\.txt: was changed while it was read"):
        prepare(tmp_path / "out", [str(path)], HERE)
    monkeypatch.undo()
    prepare(tmp_path / "out", [str(path)], HERE)
    assert prepared(tmp_path / "out") == [b"after!"]


def test_what_is_wrong_with_the_disk_is_no_property_of_the_text(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"text")

    def failing(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(units, "open_stream", failing)
    with pytest.raises(DataError, match="Input/output error.*the same command goes on"):
        prepare(tmp_path / "out", [f"{tmp_path}/a.txt"], SKIP)
    monkeypatch.undo()
    assert prepare(tmp_path / "out", [f"{tmp_path}/a.txt"], SKIP)["unreadable"] == 0
    assert prepared(tmp_path / "out") == [b"text"]


def test_full_disk_while_a_shard_is_written(many, tmp_path):
    out = tmp_path / "out"
    (out / ".parts").mkdir(parents=True)
    os.symlink("/dev/full", out / ".parts" / "train-00000-of-00001.array_record.tmp")
    with pytest.raises(DataError, match=r"cannot be written: .*No space left.*the same command goes on"):
        prepare(out, many, HERE)
    (out / ".parts" / "train-00000-of-00001.array_record.tmp").unlink()
    assert prepare(out, many, HERE)["documents"] == len(prepared(out)) == 450


def test_array_records_in_groups_and_damaged(tmp_path):
    records = [random.Random(i).randbytes(200).hex().encode() for i in range(3000)]
    for size in (1, 7, 1000):
        writer = array_record_module.ArrayRecordWriter(str(tmp_path / f"{size}.array_record"), f"group_size:{size}")
        for record in records:
            writer.write(record)
        writer.close()
        prepare(tmp_path / f"out{size}", [f"{tmp_path}/{size}.array_record"], HERE)
        assert prepared(tmp_path / f"out{size}") == records
    data = bytearray((tmp_path / "7.array_record").read_bytes())
    at = 100_000  # in the middle of some records
    data[at : at + 20] = bytes(20)
    (tmp_path / "damaged.array_record").write_bytes(data)
    manifest = prepare(tmp_path / "out", [f"{tmp_path}/damaged.array_record"], SKIP)
    kept = prepared(tmp_path / "out")
    assert 1 <= manifest["unreadable"] < 100 and len(kept) + manifest["unreadable"] == 3000
    bad = {index for _, index, _ in errors(tmp_path / "out")}
    assert kept == [r for i, r in enumerate(records) if i not in bad]


def test_parquet_with_nulls_other_types_and_a_broken_row_group(tmp_path):
    import pyarrow

    write_parquet(tmp_path / "a.parquet", ["x", None, "y"])
    write_parquet(tmp_path / "b.parquet", pyarrow.array(["p", "q", "p"]).dictionary_encode())
    write_parquet(tmp_path / "c.parquet", [1, 2])
    write_parquet(tmp_path / "d.parquet", pyarrow.array([b"raw \xc3", b"s"], pyarrow.binary()))
    write_parquet(tmp_path / "e.parquet", [f"{i}" * 300 for i in range(40)], rows=10)
    whole = bytearray((tmp_path / "e.parquet").read_bytes())
    import pyarrow.parquet

    at = pyarrow.parquet.ParquetFile(tmp_path / "e.parquet").metadata.row_group(1).column(0).dictionary_page_offset
    whole[at : at + 30] = b"\xff" * 30
    (tmp_path / "e.parquet").write_bytes(whole)
    prepare(tmp_path / "out", [f"{tmp_path}/*.parquet"], SKIP)
    kept = [*range(10), *range(20, 40)]
    assert prepared(tmp_path / "out") == [
        b"x",
        b"y",
        b"p",
        b"q",
        b"p",
        b"raw \xc3",
        b"s",
        *(b"%d" % i * 300 for i in kept),
    ]
    found = errors(tmp_path / "out")
    assert [e[:2] for e in found] == [("a.parquet", 1), ("c.parquet", 0), ("c.parquet", 1), ("e.parquet", 10)]
    assert "null" in found[0][2] and "int64, not text" in found[1][2] and "row group 1 from its row 0 on" in found[3][2]


def die_at_three(x):
    if x == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return 10 * x


def test_a_job_that_kills_its_process_is_told_from_the_others():
    outcomes = {job: out for job, out in run_jobs(die_at_three, list(range(6)), 2)}
    assert isinstance(outcomes.pop(3), JobDied) and outcomes == {i: 10 * i for i in (0, 1, 2, 4, 5)}


def test_a_part_whose_reader_died_is_read_again(tmp_path, monkeypatch):
    """In this run it counts as unreadable, its good neighbours are kept; the next run tries again."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_bytes(name.encode())

    def dying(function, jobs, workers):
        for job in jobs:
            if any(source.name.endswith("b.txt") for source in getattr(job, "sources", ())):
                yield job, JobDied()
            else:
                yield job, function(job)

    for room in ("prepare", "parts"):
        monkeypatch.setattr(f"bytelm.data.{room}.run_jobs", lambda f, jobs, n: list(dying(f, jobs, n)))
    real = shards.write_shard

    def stopped(job):
        real(job)  # the shard of what could be read is written, then the run is stopped
        raise KeyboardInterrupt

    monkeypatch.setattr("bytelm.data.prepare.write_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "out", [f"{tmp_path}/?.txt"], SKIP)
    (report,) = (p for p in (tmp_path / "out" / ".parts").glob("*.json") if "record" not in p.name)
    assert [s["unreadable"] for s in json.loads(report.read_text())["sources"]] == [0, 1, 0]
    (noted,) = (tmp_path / "out" / ".parts").glob("*.errors")
    assert "the process that read it died" in noted.read_text() and "1 bytes" in noted.read_text()
    monkeypatch.undo()
    assert prepare(tmp_path / "out", [f"{tmp_path}/?.txt"], SKIP)["unreadable"] == 0
    assert prepared(tmp_path / "out") == [b"a", b"b", b"c"]


@pytest.mark.slow
def test_killed_at_random_points(root, tmp_path):
    """SIGKILL to the command at any moment, then the same command again: the same bytes in all files."""
    rng = random.Random(0)
    for i in range(6):
        rows = (" ".join(rng.choices(("alpha", "beta", "gamma", "delta"), k=rng.randint(1, 400))) for _ in range(1500))
        (tmp_path / f"{i}.jsonl.gz").write_bytes(gzip.compress(jsonl(*rows) + b"broken\n", 1))
    inputs, options = [f"{tmp_path}/*.jsonl.gz"], ("--on-error", "skip", "--shard-bytes", "300000", "--deduplicate")
    began = time.monotonic()
    whole = command(root, tmp_path / "whole", inputs, *options)
    assert whole.wait(timeout=300) == 0
    seconds = time.monotonic() - began
    wanted, kills = files_of(tmp_path / "whole"), 0
    assert len(wanted) > 20
    while kills < (20 if "BYTELM_EVERY_DAMAGE" in os.environ else 6):
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        for _ in range(5):  # killed up to five times on its way to the end
            run = command(root, tmp_path / "killed", inputs, *options)
            try:
                run.wait(timeout=rng.uniform(0.3, 1.0) * seconds)
            except subprocess.TimeoutExpired:
                run.kill()
                kills += run.wait() == -signal.SIGKILL
        run = command(root, tmp_path / "killed", inputs, *options)
        assert run.wait(timeout=300) == 0, run.communicate()
        assert files_of(tmp_path / "killed") == wanted


def damaged(data, rng):
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        kind, at = rng.randrange(5), rng.randrange(len(data) + 1)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at:at] = rng.randbytes(rng.randint(1, 20))
        elif kind == 2 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            del data[at : at + rng.randint(1, 20)]
        else:
            data[at:at] = rng.choice([b"\n", b"\r\n", b"\xff\xfe", b"\x00", b"{", b'"', b"\xed\xa0\x80", b"[" * 3000])
    return bytes(data)


def good_lines(content):
    """What a jsonl holds, told by the standard library alone."""
    for line in content.split(b"\n"):
        try:
            text = json.loads(line)["text"]
            if isinstance(text, str) and text.encode():
                yield text.encode()
        except (ValueError, TypeError, KeyError, RecursionError):
            continue


@pytest.mark.slow
def test_ten_thousand_damaged_files(tmp_path):
    """Broken JSON, gzip, parquet, ArrayRecord, UTF-8, empty files, long lines: reports, no crash, no good line lost."""
    rng = random.Random(1)
    folder = tmp_path / "in"
    folder.mkdir()
    wanted = []
    for i in range(10000):
        kind = ("jsonl", "txt", "jsonl.gz", "parquet", "array_record")[i % 5]
        documents = [f"{i} {j} " + "wört " * rng.randint(0, 30) for j in range(rng.randint(0, 5))]
        path = folder / f"{i:05}.{kind}"
        if kind == "parquet" and i < 2000:
            write_parquet(path, documents)
            content = path.read_bytes()
        elif kind == "array_record" and i < 2000:
            write_records(path, [d.encode() for d in documents])
            content = path.read_bytes()
        elif kind in ("parquet", "array_record"):  # damage to the ones made before
            content = (folder / f"{i % 2000:05}.{kind}").read_bytes()
        else:
            content = jsonl(*documents)
        whole = rng.random() < 0.1 or (i < 2000 and kind in ("parquet", "array_record"))
        if kind == "jsonl.gz":
            content = gzip.compress(content) if rng.random() < 0.7 else gzip.compress(damaged(content, rng))
        content = content if whole else damaged(content, rng)
        if rng.random() < 0.02:
            content = b""
        path.write_bytes(content)
        if kind == "jsonl":
            wanted += [(i, d) for d in good_lines(content)]
        elif kind == "txt" and content and b"\xfe" not in content and b"\xff" not in content:
            wanted.append((i, content))
        elif whole and content:
            wanted += [(i, d.encode()) for d in documents if i < 2000] if kind != "jsonl.gz" else [
                (i, d) for d in good_lines(gzip.decompress(content))]  # fmt: skip
    inputs = [f"{folder}/*.{kind}" for kind in ("jsonl", "txt", "jsonl.gz", "parquet", "array_record")]
    manifest = prepare(tmp_path / "out", inputs, dataclasses.replace(SKIP, workers=2, max_record_bytes=1 << 20))
    got = prepared(tmp_path / "out")
    assert not Counter(d for _, d in wanted) - Counter(got)
    assert manifest["unreadable"] == len(errors(tmp_path / "out")) > 3000
    assert manifest["documents"] == len(got) > 5000
    assert sum(s["unreadable"] for s in manifest["sources"]) == manifest["unreadable"]
