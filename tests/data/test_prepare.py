"""`bytelm prepare`: every kind of file, splits, duplicates, errors, resumption; and reading what it made."""

import bz2
import dataclasses
import gzip
import hashlib
import json
import lzma
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zstandard
from array_record.python import array_record_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bytelm.config import ConfigError, DataConfig
from bytelm.data import parts, shards, units
from bytelm.data.corpus import PreparedCorpus
from bytelm.data.jobs import JobDied, run_jobs
from bytelm.data.pipeline import Batches, Pieces, load_text
from bytelm.data.prepare import prepare
from bytelm.data.readers import DataError
from bytelm.data.sources import open_corpus, split_validation
from bytelm.data.units import PrepareOptions
from bytelm.vocab import FLAT_IDS

HERE = PrepareOptions(workers=0, valid_fraction=0.0)  # in this process, all of it training text
SKIP = dataclasses.replace(HERE, on_error="skip")


def texts(corpus):
    return [corpus.read(i) for i in range(len(corpus))]


def prepared(folder, split="train"):
    return texts(PreparedCorpus(folder, split))


def jsonl(*documents):
    return "".join(json.dumps({"text": d}) + "\n" for d in documents).encode()


def errors(folder):
    lines = (folder / "errors.jsonl").read_text().splitlines()
    return [(os.path.basename(e["file"]), e["index"], e["reason"]) for e in map(json.loads, lines)]


def write_parquet(path, documents, rows=3, column="text"):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({column: documents, "other": list(range(len(documents)))}), path,
                                row_group_size=rows)  # fmt: skip


def write_records(path, records):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def files_of(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def test_every_kind_of_file_in_one_corpus(tmp_path):
    """Plain and compressed text and jsonl, parquet, ArrayRecord: each document byte for byte, in order of inputs."""
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress,
            ".zst": zstandard.ZstdCompressor().compress}  # fmt: skip
    inputs, wanted = [], []
    for suffix, packed in pack.items():
        (tmp_path / f"t.txt{suffix}").write_bytes(packed(b"\xef\xbb\xbftext \xc3\r\n" + suffix.encode()))
        (tmp_path / f"j.jsonl{suffix}").write_bytes(packed(jsonl("naïve\r\n" + suffix, "", "b" + suffix) + b"\n \n"))
        inputs += [f"{tmp_path}/t.txt{suffix}", f"{tmp_path}/j.jsonl{suffix}"]
        wanted += [b"\xef\xbb\xbftext \xc3\r\n" + suffix.encode(), f"naïve\r\n{suffix}".encode(), f"b{suffix}".encode()]
    write_parquet(tmp_path / "p.parquet", ["zwölf", "", *map(str, range(8))])
    write_records(tmp_path / "r.array_record", [b"one", b"", b"\xc3 three"])
    inputs += [f"{tmp_path}/p.*", f"{tmp_path}/r.array_record"]
    wanted += ["zwölf".encode(), *(b"%d" % i for i in range(8)), b"one", b"\xc3 three"]
    shown = []
    options = dataclasses.replace(HERE, license=("CC0",))
    manifest = prepare(tmp_path / "out", inputs, options, shown.append)
    assert prepared(tmp_path / "out") == wanted and prepared(tmp_path / "out", "valid") == []
    assert manifest["documents"] == len(wanted) and manifest["empty"] == 7 and manifest["unreadable"] == 0
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {s["license"] for s in manifest["sources"]} == {"CC0"} and len(manifest["sources"]) == 12
    (shard,) = manifest["splits"]["train"]["shards"]
    assert shard["sha256"] == hashlib.sha256((tmp_path / "out" / shard["file"]).read_bytes()).hexdigest()
    assert shard["bytes"] == sum(map(len, wanted)) == manifest["splits"]["train"]["bytes"]
    assert shown[-1].phase == "writing" and shown[-1].done == shown[-1].total
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == []


def test_columns_and_fields_of_other_names(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "x"}\n')
    write_parquet(tmp_path / "b.parquet", ["y"], column="body")
    write_records(tmp_path / "c.array_record", [b'{"body": "z"}', b"[]"])
    options = dataclasses.replace(SKIP, text_field="body", records="json")
    prepare(tmp_path / "out", [f"{tmp_path}/*.jsonl", f"{tmp_path}/*.parquet", f"{tmp_path}/*.array_record"], options)
    assert prepared(tmp_path / "out") == [b"x", b"y", b"z"]
    assert [e[:2] for e in errors(tmp_path / "out")] == [("c.array_record", 1)]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=30), st.integers(1, 20), st.integers(1, 60), st.data())
def test_any_stretch_of_any_document(tmp_path, documents, piece, shard, data):
    """Records shorter and longer than documents, shards that end anywhere: reading gives the bytes that went in."""
    documents = [d.replace(b"\xfe", b"").replace(b"\xff", b"") for d in documents]
    shutil.rmtree(tmp_path, ignore_errors=True)
    tmp_path.mkdir()
    for i, document in enumerate(documents):
        (tmp_path / f"{i:03}.txt").write_bytes(document)
    full = [d for d in documents if d]
    options = dataclasses.replace(HERE, piece_bytes=piece, shard_bytes=shard)
    if not full:
        with pytest.raises(DataError, match="hold no text"):
            prepare(tmp_path / "out", [f"{tmp_path}/*.txt"], options)
        return
    prepare(tmp_path / "out", [f"{tmp_path}/*.txt"], options)
    corpus = PreparedCorpus(tmp_path / "out", "train")
    assert texts(corpus) == full and corpus.total_bytes == sum(map(len, full))
    for _ in range(5):
        i = data.draw(st.integers(0, len(full) - 1))
        a = data.draw(st.integers(0, len(full[i])))
        b = data.draw(st.integers(a, len(full[i]) + 3))
        assert corpus.read(i, a, b) == full[i][a:b]


@pytest.fixture
def many(tmp_path):
    """400 documents in several files, every fourth twice."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(*(f"document {i} " * (i % 7 + 1) for i in range(200))))
    (tmp_path / "b.jsonl.gz").write_bytes(
        gzip.compress(jsonl(*(f"document {i} " * (i % 7 + 1) for i in range(0, 800, 4))))
    )
    write_parquet(tmp_path / "c.parquet", [f"row {i}" for i in range(50)], rows=7)
    return [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl.gz", f"{tmp_path}/c.parquet"]


def test_splits_and_duplicates(many, tmp_path):
    options = dataclasses.replace(HERE, valid_fraction=0.1, deduplicate=True)
    manifest = prepare(tmp_path / "out", many, options)
    train, valid = prepared(tmp_path / "out"), prepared(tmp_path / "out", "valid")
    every = [f"document {i} " * (i % 7 + 1) for i in [*range(200), *range(200, 800, 4)]] + [
        f"row {i}" for i in range(50)
    ]
    assert sorted([*train, *valid]) == sorted(e.encode() for e in every)
    assert manifest["duplicates"] == 50 and len(valid) in range(20, 65) and not set(train) & set(valid)
    assert [e for e in map(str.encode, every) if e in set(train)] == train  # the first of equals, in order
    (tmp_path / "again.jsonl").write_bytes(jsonl(*every))
    kept, held = split_validation(open_corpus((f"{tmp_path}/again.jsonl",), cache_dir=f"{tmp_path}/cache"), 0.1)
    assert texts(held) == valid and texts(kept) == train  # as the trainer splits what is not prepared


def test_few_documents_give_their_ends_to_validation(tmp_path):
    (tmp_path / "t.txt").write_bytes(bytes(range(200)))
    prepare(tmp_path / "out", [f"{tmp_path}/t.txt"], dataclasses.replace(HERE, valid_fraction=0.1))
    assert prepared(tmp_path / "out") == [bytes(range(180))]
    assert prepared(tmp_path / "out", "valid") == [bytes(range(180, 200))]


def test_how_the_work_is_cut_and_shared_changes_nothing(many, tmp_path, monkeypatch):
    """Small units against large ones, worker processes against none: the same bytes in the same files."""
    options = dataclasses.replace(HERE, valid_fraction=0.05, shard_bytes=2000)
    prepare(tmp_path / "one", many, options)
    prepare(tmp_path / "two", many, dataclasses.replace(options, workers=2))
    monkeypatch.setattr(units, "UNIT_BYTES", 700)
    prepare(tmp_path / "three", many, options)
    one = files_of(tmp_path / "one")
    assert len(one) > 6 and one == files_of(tmp_path / "two") == files_of(tmp_path / "three")


@pytest.mark.parametrize(
    "name,content,found",
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n{"text": "b"}\n', [(2, "not a JSON record")]),
        ("u.jsonl", b'{"text": "\xff"}\n{"text": "b"}', [(0, "not a JSON record.*utf-8")]),
        ("f.jsonl", b'{"txt": "a"}\n[1]\n{"text": 3}\n{"text": null}', [(i, "no string field") for i in range(4)]),
        ("s.jsonl", b'{"text": "\\ud800"}', [(0, "lone surrogate")]),
        ("deep.jsonl", b"[" * 3000 + b'\n{"text": "b"}', [(0, "not a JSON record")]),
        ("long.jsonl", b'{"text": "' + b"x" * 5000 + b'"}\n{"text": "b"}', [(0, "a line of over 4,000 bytes")]),
        ("cut.jsonl.gz", gzip.compress(jsonl("a", "b", "c"))[:-9], [(3, "damaged")]),
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


def test_all_frames_of_a_zst(tmp_path):
    """Frames one after the other, empty ones among them, and one larger than what is read at once."""
    big = np.random.default_rng(0).integers(0, 200, 300_000, dtype=np.uint8).tobytes()
    frames = [b"one ", b"", big, b"end"]
    (tmp_path / "t.txt.zst").write_bytes(b"".join(map(zstandard.compress, frames)))
    prepare(tmp_path / "out", [f"{tmp_path}/t.txt.zst"], HERE)
    assert prepared(tmp_path / "out") == [b"".join(frames)]
    (tmp_path / "empty.txt.zst").write_bytes(b"")
    assert prepare(tmp_path / "out2", [f"{tmp_path}/*.zst"], HERE)["empty"] == 1


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


def test_the_output_is_no_input(tmp_path):
    """An output folder among the inputs: what stands in it is left alone, before, on resume and when it is done."""
    (tmp_path / "a.txt").write_bytes(b"text")
    out = tmp_path / "out"
    first = prepare(out, [f"{tmp_path}/**/*"], HERE)
    assert prepare(out, [f"{tmp_path}/**/*"], HERE) == first and prepared(out) == [b"text"]
    os.symlink(tmp_path, tmp_path.parent / f"{tmp_path.name}-link")  # by another name
    link = tmp_path.parent / f"{tmp_path.name}-link"
    assert prepare(link / "out", [f"{link}/**/*"], HERE)["splits"] == first["splits"]
    with pytest.raises(ConfigError, match="every input lies in the output folder"):
        prepare(out, [f"{out}/*.array_record"], HERE)


def test_links_and_views(tmp_path):
    import pyarrow

    os.symlink(tmp_path / "gone", tmp_path / "link.txt")
    (tmp_path / "a.txt").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"link\.txt is no file \(a broken link\?\)"):
        prepare(tmp_path / "out", [f"{tmp_path}/*.txt"], HERE)
    write_parquet(tmp_path / "v.parquet", pyarrow.array(["p", None], pyarrow.string_view()))
    prepare(tmp_path / "out", [f"{tmp_path}/v.parquet"], SKIP)
    assert prepared(tmp_path / "out") == [b"p"]


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


def test_several_prepared_corpora(many, tmp_path):
    """Each brings the text it holds out; other files beside them are split; a resumed run knows them by hash."""
    options = dataclasses.replace(HERE, valid_fraction=0.2)
    for i in (0, 1):
        prepare(tmp_path / f"p{i}", [many[i]], options)
    both = (f"{tmp_path}/p0", f"{tmp_path}/p1")
    config = DataConfig(train=both, seq_len=16, batch_size=4, cache_dir=f"{tmp_path}/c")
    wanted = [t for i in (0, 1) for t in prepared(tmp_path / f"p{i}")]
    held = [t for i in (0, 1) for t in prepared(tmp_path / f"p{i}", "valid")]
    (train,), valid = load_text(config)
    assert texts(train) == wanted and texts(valid) == held
    weighted, same = load_text(dataclasses.replace(config, weights=(1.0, 2.0)))
    assert [type(c) for c in weighted] == [PreparedCorpus] * 2 and texts(same) == held
    (mixed,), more = load_text(dataclasses.replace(config, train=(f"{tmp_path}/p0", many[1]), valid_fraction=0.2))
    assert sorted(texts(mixed) + texts(more)) == sorted(wanted + held)
    assert texts(more)[: len(prepared(tmp_path / "p0", "valid"))] == prepared(tmp_path / "p0", "valid")
    with pytest.raises(ConfigError, match=r"name the held-out text in data\.valid"):
        load_text(dataclasses.replace(config, train=(f"{tmp_path}/p0", many[1]), weights=(1.0, 1.0)))

    batches = Batches([train], config, FLAT_IDS, seed=0)
    next(batches)
    state = json.loads(json.dumps(batches.state()))
    Batches([train], config, FLAT_IDS, seed=0, state=state)
    shutil.rmtree(tmp_path / "p0")
    (tmp_path / "turned.jsonl").write_bytes(b"\n".join(reversed(Path(many[0]).read_bytes().splitlines())))
    prepare(tmp_path / "p0", [f"{tmp_path}/turned.jsonl"], options)  # as many documents and bytes, in another order
    with pytest.raises(ConfigError, match="the training text has changed since the checkpoint"):
        Batches(load_text(config)[0], config, FLAT_IDS, seed=0, state=state)

    prepare(tmp_path / "all", [many[0]], HERE)
    with pytest.raises(ConfigError, match=r"data\.valid: the valid split of .*all is empty"):
        load_text(dataclasses.replace(config, valid=(f"{tmp_path}/all",)))


def test_reserved_bytes_may_be_kept(tmp_path):
    (tmp_path / "b.bin").write_bytes(bytes(range(256)))
    prepare(tmp_path / "out", [f"{tmp_path}/b.bin"], dataclasses.replace(HERE, reserved="keep"))
    assert prepared(tmp_path / "out") == [bytes(range(256))]


def test_line_numbers_across_stretches_of_a_file(tmp_path, monkeypatch):
    """A jsonl cut into stretches of 50 bytes: each line is read once, and errors count from the file's start."""
    monkeypatch.setattr(units, "UNIT_BYTES", 50)
    lines = [b"broken" if i % 5 == 2 else b'{"text": "%s"}' % (b"%d" % i * (i % 30)) for i in range(100)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    prepare(tmp_path / "out", [f"{tmp_path}/a.jsonl"], SKIP)
    assert prepared(tmp_path / "out") == [b"%d" % i * (i % 30) for i in range(100) if i % 5 != 2 and i % 30]
    assert [index for _, index, _ in errors(tmp_path / "out")] == list(range(2, 100, 5))


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


def test_what_cannot_be_asked(tmp_path, many):
    out = tmp_path / "out"
    for inputs, options, message in [
        (["nothing*.txt"], {}, "matches no file"), ([str(tmp_path)], {}, "it is a folder"),
        ([many[0], many[0]], {}, "named twice"), (many, {"license": ("a", "b")}, "2 for 3 inputs"),
        ([], {}, "name at least one input"), (["bundled:milton"], {}, "no bundled corpus"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            prepare(out, inputs, dataclasses.replace(HERE, **options))
    for name in ("valid_fraction", "piece_bytes", "shard_bytes", "workers"):
        with pytest.raises(ConfigError, match=name.replace("_", "-")):
            dataclasses.replace(HERE, **{name: -1})
    (tmp_path / "x.pdf").touch()
    with pytest.raises(ConfigError, match="pdf files are not read"):
        prepare(out, [f"{tmp_path}/x.pdf"], HERE)
    with pytest.raises(ConfigError, match="is not empty, and is no prepared corpus"):
        prepare(tmp_path, many, HERE)
    prepare(out, many, HERE)
    before = files_of(out)
    assert prepare(out, many, dataclasses.replace(HERE, workers=2)) and files_of(out) == before  # nothing to do
    with pytest.raises(ConfigError, match="other inputs or with other options"):
        prepare(out, many, dataclasses.replace(HERE, valid_fraction=0.5))


def test_unfinished_and_damaged_corpora_are_refused(many, tmp_path):
    out = tmp_path / "out"
    prepare(out, many, dataclasses.replace(HERE, shard_bytes=4000))
    config = DataConfig(train=(str(out),), seq_len=16, batch_size=4)
    shards = sorted(out.glob("*.array_record"))
    whole = shards[1].read_bytes()
    with open(shards[1], "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=rf"{shards[1].name}: has .* bytes, the manifest says {len(whole):,}"):
        load_text(config)
    shards[1].unlink()
    with pytest.raises(DataError, match="is missing, the manifest lists it"):
        load_text(config)
    middle = len(whole) // 2 if len(whole) < 70000 else 300
    shards[1].write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) * 200 + whole[middle + 200 :])
    with pytest.raises(DataError, match=rf"{shards[1].name}"):
        texts(load_text(config)[0][0])
    shards[1].write_bytes(whole)
    table = (out / "train.documents.npy").read_bytes()
    for damage in (table[:-8], b"", table.replace(b"<i8", b"<f8")):
        (out / "train.documents.npy").write_bytes(damage)
        with pytest.raises(DataError, match=r"train\.documents\.npy"):
            load_text(config)
    (out / "train.documents.npy").write_bytes(table)
    manifest = (out / "manifest.json").read_text()
    for name, wrong in (("documents", "x"), ("sha256", None), ("shards", 3)):
        edited = json.loads(manifest)
        edited["splits"]["train"][name] = wrong
        (out / "manifest.json").write_text(json.dumps(edited))
        with pytest.raises(DataError, match=f"not the manifest of a prepared corpus.*{name}"):
            load_text(config)
    (out / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match="not the manifest of a prepared corpus"):
        load_text(config)
    (out / "manifest.json").unlink()
    (out / ".parts").mkdir()
    with pytest.raises(DataError, match="not prepared to the end"):
        load_text(config)


def test_training_reads_it_like_the_files_themselves(tmp_path):
    """The same documents from a jsonl and prepared: the same batches, of whose text both can say where it is from."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(*(f"document {i} " * (i % 9 + 1) for i in range(100))))
    prepare(tmp_path / "out", [f"{tmp_path}/a.jsonl"], dataclasses.replace(HERE, valid_fraction=0.1, piece_bytes=10))
    made = []
    for source in (f"{tmp_path}/a.jsonl", str(tmp_path / "out")):
        config = DataConfig(
            train=(source,), valid_fraction=0.1, seq_len=16, batch_size=4, cache_dir=str(tmp_path / "c")
        )
        sources, valid = load_text(config)
        made.append((Batches(sources, config, FLAT_IDS, seed=0), texts(valid)))
    assert made[0][1] == made[1][1]
    for _ in range(30):
        a, b = next(made[0][0]), next(made[1][0])
        assert all((a[k] == b[k]).all() for k in a)
    for (batches, _), name in zip(made, ("a.jsonl#", "out/train#")):
        where = batches.where(a)
        assert where and all(w.startswith(f"{tmp_path}/{name}") for w in where)


def test_an_open_corpus_needs_no_memory(many, tmp_path):
    """Tables stay on disk, in worker processes too: what travels there does not grow with the corpus."""
    prepare(tmp_path / "out", many, HERE)
    corpus = PreparedCorpus(tmp_path / "out", "train")
    pieces = Pieces(corpus, 16, FLAT_IDS, cache_dir=str(tmp_path / "cache"))
    assert len(pickle.dumps(pieces)) < 1500
    again = pickle.loads(pickle.dumps(pieces))
    for table in (corpus.start, corpus.stop, again.ends, again.corpus.stop):
        assert isinstance(table, np.memmap)
    assert len(again) == len(pieces) and (again[7]["columns"] == pieces[7]["columns"]).all()


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


def command(root, out, inputs, *options):
    env = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen([sys.executable, "-m", "bytelm.cli", "prepare", str(out), *inputs, *options], env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def test_the_command(root, tmp_path, many):
    (tmp_path / "bad.jsonl").write_bytes(b"{\n")
    run = command(root, tmp_path / "out", [*many, f"{tmp_path}/bad.jsonl"])
    said = run.communicate(timeout=100)
    assert run.returncode == 2 and "bad.jsonl: record 0 cannot be read: not a JSON record" in said[1]
    assert "Traceback" not in said[1]
    run = command(root, tmp_path / "out", [*many, f"{tmp_path}/bad.jsonl"], "--on-error", "skip", "--license", "CC0")
    said = run.communicate(timeout=100)
    assert run.returncode == 0, said
    assert "449 documents" in said[0] and "1 unreadable" in said[0] and "450 documents" in said[1]


@pytest.mark.slow
def test_killed_at_twenty_random_points(root, tmp_path):
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
    while kills < 20:
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
