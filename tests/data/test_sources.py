"""Files of every kind as documents, slices, the bundled corpus, the validation split, and what bad files say."""

import gzip
import hashlib
import json
import lzma
import os

import numpy as np
import pytest
import zstandard

from bytelm.config import ConfigError
from bytelm.data.readers import DataError
from bytelm.data.sources import open_corpus, split_validation


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def texts(corpus):
    return [corpus.read(i) for i in range(len(corpus))]


def jsonl(*records):
    return "".join(json.dumps(r) + "\n" for r in records).encode()


def test_plain_files_are_documents_byte_for_byte(files):
    (files / "b.txt").write_bytes(b"\xef\xbb\xbfsecond\r\n")
    (files / "a.txt").write_bytes(b"first \xff\xfe\x00")
    (files / "empty.txt").write_bytes(b"")
    corpus = open_corpus((str(files / "*.txt"),))
    assert texts(corpus) == [b"first \xff\xfe\x00", b"\xef\xbb\xbfsecond\r\n"]
    assert corpus.total_bytes == 20 and corpus.describe() == "2 documents, 20 bytes"
    assert corpus.read(0, 2, 5) == b"rst"


@pytest.mark.parametrize(
    "suffix,pack",
    [("", bytes), (".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress), (".xz", lzma.compress)],
)
def test_jsonl_and_compressed_files(files, suffix, pack):
    (files / f"d.jsonl{suffix}").write_bytes(
        pack(jsonl({"text": "naïve\r\n"}, {"text": ""}, {"text": "b", "x": 1}) + b"\n")
    )
    (files / f"t.txt{suffix}").write_bytes(pack(b"line\nline \xff"))
    assert texts(open_corpus((str(files / f"d.jsonl{suffix}"),))) == ["naïve\r\n".encode(), b"b"]
    assert texts(open_corpus((str(files / f"t.txt{suffix}"),))) == [b"line\nline \xff"]
    assert texts(open_corpus((str(files / f"d.jsonl{suffix}[2:]"),))) == [b"b"]


def test_another_text_field(files):
    (files / "d.jsonl").write_bytes(jsonl({"content": "x"}))
    assert texts(open_corpus((str(files / "d.jsonl"),), text_field="content")) == [b"x"]


def test_a_changed_file_is_unpacked_again(files):
    path = files / "d.jsonl"
    path.write_bytes(jsonl({"text": "one"}))
    assert texts(open_corpus((str(path),))) == [b"one"]
    path.write_bytes(jsonl({"text": "two!"}))
    assert texts(open_corpus((str(path),))) == [b"two!"]


def test_slices_of_text(files):
    path = files / "t.txt"
    path.write_bytes(b"0123456789")
    assert texts(open_corpus((f"{path}[2:5]", f"{path}[8:]", f"{path}[:1]"))) == [b"234", b"89", b"0"]
    with pytest.raises(ConfigError, match="10 bytes; a slice cannot start at 11"):
        open_corpus((f"{path}[11:]",))
    (files / "u.txt").write_bytes(b"x")
    with pytest.raises(ConfigError, match="a slice of 2 files"):
        open_corpus((f"{files}/*.txt[1:2]",))


def test_bundled_corpus_is_the_known_file(files):
    corpus = open_corpus(("bundled:shakespeare",))
    assert hashlib.sha256(corpus.read(0)).hexdigest().startswith("86c4e6aa9db7c042ec79")
    with pytest.raises(ConfigError, match="no bundled corpus 'milton'; there is shakespeare"):
        open_corpus(("bundled:milton",))


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', r"bad.jsonl:2: not a JSON record"),
        ("utf.jsonl", b'{"text": "\xff"}\n', r"utf.jsonl:1: not a JSON record"),
        ("field.jsonl", b'{"txt": "a"}\n', r"field.jsonl:1: no string field 'text' .*the record has txt"),
        ("deep.jsonl", b"[" * 100000, r"deep.jsonl:1: not a JSON record"),
        ("list.jsonl", b"[1]\n", r"list.jsonl:1: no string field"),
        ("half.jsonl", b'{"text": "\\ud800"}\n', r"half.jsonl:1: character 0 of 'text' is a lone surrogate"),
        ("cut.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:-9], r"cut.txt.gz: damaged"),
        ("no.txt.gz", b"plain text", r"no.txt.gz: damaged or not what its name says"),
        ("no.txt.zst", b"plain text", r"no.txt.zst: damaged"),
        ("no.txt.xz", b"plain text", r"no.txt.xz: damaged"),
    ],
)
def test_damaged_files_say_where(files, name, content, message):
    (files / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_corpus((str(files / name),))
    assert not list((files / "cache").rglob("*.bytes"))  # nothing half-written is left to be trusted


def test_missing_empty_and_unreadable(files):
    with pytest.raises(ConfigError, match="data.train: '.*nothing.*' matches no file"):
        open_corpus((str(files / "nothing*.txt"),))
    with pytest.raises(ConfigError, match="it is a folder"):
        open_corpus((str(files),))
    (files / "e.txt").touch()
    with pytest.raises(ConfigError, match="hold no text"):
        open_corpus((str(files / "e.txt"),))
    (files / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"\.parquet is read by bytelm prepare"):
        open_corpus((str(files / "p.parquet"),))


def test_a_file_that_shrinks_is_noticed(files):
    path = files / "t.txt"
    path.write_bytes(b"0123456789")
    corpus = open_corpus((str(path),))
    path.write_bytes(b"0123")
    with pytest.raises(DataError, match="shorter than when the run began"):
        corpus.read(0)
    path.write_bytes(b"9876543210")  # as long as it was, and another text
    with pytest.raises(DataError, match="was changed since the run began"):
        corpus.read(0)
    os.unlink(path)
    with pytest.raises(DataError, match="cannot be read any more"):
        corpus.select(np.array([0])).read(0)


def test_more_files_than_may_be_open(files):
    """Two thousand files with room for sixty-four descriptors."""
    for i in range(2000):
        (files / f"{i:04}.txt").write_bytes(b"%d" % i)
    corpus = open_corpus((str(files / "*.txt"),))
    before = len(os.listdir("/proc/self/fd"))
    assert texts(corpus) == [b"%d" % i for i in range(2000)] and texts(corpus)[:3] == [b"0", b"1", b"2"]
    assert len(os.listdir("/proc/self/fd")) - before <= 64


def test_few_documents_always_leave_something_held_out(files):
    for seed in range(20):
        (files / f"{seed}.jsonl").write_bytes(jsonl(*({"text": f"{seed} {i}"} for i in range(20))))
        train, valid = split_validation(open_corpus((str(files / f"{seed}.jsonl"),)), 0.05)
        assert len(valid) >= 1 and len(train) + len(valid) == 20


def test_validation_by_hash_does_not_depend_on_order(files):
    records = [{"text": f"document {i}"} for i in range(400)]
    (files / "a.jsonl").write_bytes(jsonl(*records))
    (files / "b.jsonl").write_bytes(jsonl(*records[::-1]))
    train, valid = split_validation(open_corpus((str(files / "a.jsonl"),)), 0.1)
    _, again = split_validation(open_corpus((str(files / "b.jsonl"),)), 0.1)
    assert len(train) + len(valid) == 400 and 20 < len(valid) < 65
    assert set(texts(valid)) == set(texts(again)) and not set(texts(train)) & set(texts(valid))


def test_validation_of_one_long_document_is_its_end(files):
    (files / "t.txt").write_bytes(bytes(range(100)))
    train, valid = split_validation(open_corpus((str(files / "t.txt"),)), 0.1)
    assert train.read(0) == bytes(range(90)) and valid.read(0) == bytes(range(90, 100))
