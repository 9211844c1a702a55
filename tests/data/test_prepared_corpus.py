"""Reading what `bytelm prepare` has written."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepare_helpers import HERE, jsonl, prepared, texts

from bytelm.config import ConfigError, DataConfig
from bytelm.data.corpus import PreparedCorpus
from bytelm.data.pipeline import Batches, Pieces, load_text
from bytelm.data.prepare import prepare
from bytelm.data.readers import DataError
from bytelm.vocab import FLAT_IDS


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
