"""`bytelm prepare`: every kind of file, splits, duplicates, errors, resumption; and reading what it made."""

import bz2
import dataclasses
import gzip
import hashlib
import json
import lzma
import os

import numpy as np
import pytest
import zstandard
from prepare_helpers import HERE, SKIP, command, errors, files_of, jsonl, prepared, texts, write_parquet, write_records

from bytelm.config import ConfigError
from bytelm.data import units
from bytelm.data.prepare import prepare
from bytelm.data.sources import open_corpus, split_validation


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


@pytest.mark.parametrize("noise", [(), ("drop", "upper")])
def test_how_the_work_is_cut_and_shared_changes_nothing(many, tmp_path, monkeypatch, noise):
    """Small units against large ones, worker processes against none: the same bytes in the same files."""
    options = dataclasses.replace(HERE, valid_fraction=0.05, shard_bytes=2000, noise=noise, noise_share=0.5)
    prepare(tmp_path / "one", many, options)
    prepare(tmp_path / "two", many, dataclasses.replace(options, workers=2))
    monkeypatch.setattr(units, "UNIT_BYTES", 700)
    prepare(tmp_path / "three", many, options)
    one = files_of(tmp_path / "one")
    assert len(one) > 6 and one == files_of(tmp_path / "two") == files_of(tmp_path / "three")


def test_noise(tmp_path, monkeypatch):
    """A share of the documents is noised, each by one of the rules; what is held out is what would be, and clean."""
    texts = [f"Der Hund Nummer {n} läuft über die Straße. " * 3 for n in range(200)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(*texts))
    options = dataclasses.replace(HERE, valid_fraction=0.0, noise=("upper", "typo_swap"), noise_share=0.6, seed=3)
    prepare(tmp_path / "out", [f"{tmp_path}/a.jsonl"], options)
    found = [t.decode() for t in prepared(tmp_path / "out")]
    kinds = ["same" if a == b else "upper" if b == a.upper() else "typos" for a, b in zip(texts, found)]
    assert 60 < kinds.count("same") < 100 and min(kinds.count("upper"), kinds.count("typos")) > 35
    assert all(sorted(a) == sorted(b) for a, b, kind in zip(texts, found, kinds) if kind == "typos")
    with pytest.raises(ConfigError, match="other inputs or with other options"):
        prepare(tmp_path / "out", [f"{tmp_path}/a.jsonl"], dataclasses.replace(options, seed=4))
    clean = dataclasses.replace(HERE, valid_fraction=0.2)
    prepare(tmp_path / "clean", [f"{tmp_path}/a.jsonl"], clean)
    prepare(tmp_path / "noised", [f"{tmp_path}/a.jsonl"], dataclasses.replace(clean, noise=("upper",)))
    assert prepared(tmp_path / "noised", "valid") == prepared(tmp_path / "clean", "valid") != []  # the same, and clean
    assert prepared(tmp_path / "noised") == [t.decode().upper().encode() for t in prepared(tmp_path / "clean")]


def test_all_frames_of_a_zst(tmp_path):
    """Frames one after the other, empty ones among them, and one larger than what is read at once."""
    big = np.random.default_rng(0).integers(0, 200, 300_000, dtype=np.uint8).tobytes()
    frames = [b"one ", b"", big, b"end"]
    (tmp_path / "t.txt.zst").write_bytes(b"".join(map(zstandard.compress, frames)))
    prepare(tmp_path / "out", [f"{tmp_path}/t.txt.zst"], HERE)
    assert prepared(tmp_path / "out") == [b"".join(frames)]
    (tmp_path / "empty.txt.zst").write_bytes(b"")
    assert prepare(tmp_path / "out2", [f"{tmp_path}/*.zst"], HERE)["empty"] == 1


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


def test_line_numbers_across_stretches_of_a_file(tmp_path, monkeypatch):
    """A jsonl cut into stretches of 50 bytes: each line is read once, and errors count from the file's start."""
    monkeypatch.setattr(units, "UNIT_BYTES", 50)
    lines = [b"broken" if i % 5 == 2 else b'{"text": "%s"}' % (b"%d" % i * (i % 30)) for i in range(100)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    prepare(tmp_path / "out", [f"{tmp_path}/a.jsonl"], SKIP)
    assert prepared(tmp_path / "out") == [b"%d" % i * (i % 30) for i in range(100) if i % 5 != 2 and i % 30]
    assert [index for _, index, _ in errors(tmp_path / "out")] == list(range(2, 100, 5))


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
