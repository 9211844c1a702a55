"""Batches: nothing lost, shuffled by seed, streams fixed, resumed exactly, the same with any number of workers."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from bytelm.config import ConfigError, DataConfig
from bytelm.data.pipeline import Batches, Pieces, cut, join_states, load_text, records
from bytelm.data.sources import open_corpus
from bytelm.vocab import FLAT_IDS


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_bytes(bytes([i]) * int(rng.integers(1, 60)))
    return open_corpus((f"{tmp_path}/*.txt",))


CONFIG = DataConfig(seq_len=16, batch_size=4, shards=2, piece_bytes=20)


def batches(corpus, config=CONFIG, seed=0, **options):
    return Batches([corpus], config, FLAT_IDS, seed=seed, **options)


def equal(a, b):
    return all((a[k] == b[k]).all() for k in a)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_an_epoch_predicts_every_byte_once(corpus, packing):
    """Streams walk their share of a pass; what one pass over the records holds comes out of the rows, whole."""
    config = dataclasses.replace(CONFIG, packing=packing, shards=1, batch_size=1)
    piece = config.seq_len if packing == "best_fit" else config.piece_length
    per_epoch = len(Pieces(corpus, piece, FLAT_IDS))
    wanted = np.zeros(257, int)
    for i in range(len(corpus)):
        wanted += np.bincount([*corpus.read(i), 256], minlength=257)
    source = records(cut([corpus], config, FLAT_IDS), config, 0)
    seen = sum(np.bincount(source[i]["columns"][:, 1], minlength=257) for i in range(per_epoch))
    assert (seen == wanted).all()
    # Two passes' worth of rows hold at least one whole pass of every byte, and no byte that is not in the text.
    total = np.zeros(257, int)
    it = batches(corpus, config)
    while total.sum() < 2 * wanted.sum() + 500:
        batch = next(it)
        total += np.bincount(batch["targets"][batch["segments"] > 0], minlength=257)
    assert (total >= wanted).all() and (total[wanted == 0] == 0).all()


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_inputs_are_the_targets_shifted_within_a_segment(corpus, packing):
    it = batches(corpus, dataclasses.replace(CONFIG, packing=packing))
    starts = 0
    for _ in range(40):
        batch = next(it)
        assert batch["inputs"].shape == (4, 16) and batch["inputs"].dtype == np.int32
        same = (batch["segments"][:, 1:] == batch["segments"][:, :-1]) & (batch["segments"][:, 1:] > 0)
        assert (batch["inputs"][:, 1:] == batch["targets"][:, :-1])[same].all()
        assert (batch["targets"][:, :-1][same] != 256).all()  # the end symbol closes a segment
        starts += (batch["inputs"] == 256).sum()
        if packing == "concat":
            assert (batch["segments"] > 0).all()
    assert starts > 10


def test_best_fit_keeps_short_documents_whole(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_bytes(bytes([65 + i]) * (i % 14 + 1))
    it = batches(open_corpus((f"{tmp_path}/*.txt",)), dataclasses.replace(CONFIG, packing="best_fit"))
    for _ in range(30):
        batch = next(it)
        for row in range(4):
            for segment in range(1, batch["segments"][row].max() + 1):
                inside = batch["segments"][row] == segment
                assert batch["inputs"][row][inside][0] == 256 and batch["targets"][row][inside][-1] == 256


def test_same_seed_same_batches_other_seed_others(corpus):
    a, b, c = batches(corpus), batches(corpus), batches(corpus, seed=1)
    first = [next(a) for _ in range(5)]
    assert all(equal(x, next(b)) for x in first)
    assert not all(equal(x, next(c)) for x in first)


def test_rows_come_from_their_streams(corpus):
    """Row r of a batch is what a pipeline of stream r mod shards alone would give."""
    it = batches(corpus)
    rows = {r: [] for r in range(4)}
    for _ in range(6):
        batch = next(it)
        for r in range(4):
            rows[r].append(batch["inputs"][r])
    for stream in range(2):
        alone = records(cut([corpus], CONFIG, FLAT_IDS), CONFIG, 0)[stream::2]
        ids = np.concatenate([alone[i]["columns"][:, 0] for i in range(40)])
        interleaved = np.concatenate([row for pair in zip(rows[stream], rows[stream + 2]) for row in pair])
        assert (ids[: len(interleaved)] == interleaved).all()


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("stop", [1, 7, 23])
def test_resume_is_exact(corpus, packing, stop):
    config = dataclasses.replace(CONFIG, packing=packing)
    it = batches(corpus, config)
    for _ in range(stop):
        next(it)
    state = json.loads(json.dumps(it.state()))
    resumed = batches(corpus, config, state=state)
    for _ in range(30):
        assert equal(next(it), next(resumed))


@pytest.mark.parametrize("rows", [[(0, 1), (2, 3)], [(0, 2), (1, 3)], [(3, 1), (2,), (0,)]])
def test_processes_share_the_rows(corpus, rows):
    """However the rows lie: together they are the batch of one process, and their states join to its state."""
    config = dataclasses.replace(CONFIG, shards=0)
    whole, parts = batches(corpus, config), [batches(corpus, config, rows=some) for some in rows]
    for _ in range(5):
        batch = next(whole)
        for some, part in zip(rows, parts):
            assert equal(next(part), {k: v[list(some)] for k, v in batch.items()})
    joined = join_states([part.state() for part in parts])
    assert joined == whole.state()
    resumed = batches(corpus, config, state=joined)
    assert equal(next(resumed), next(whole))
    with pytest.raises(ConfigError, match="each must own whole rows and streams, this one has rows"):
        batches(corpus, CONFIG, rows=[0])  # stream 0 has row 2 as well
    assert equal(next(batches(corpus, CONFIG, rows=[1, 3])), {k: v[[1, 3]] for k, v in next(batches(corpus)).items()})
    with pytest.raises(ConfigError, match="does not divide the 1 streams of this process"):
        batches(corpus, dataclasses.replace(config, workers=2), rows=[1])


def test_another_number_of_streams_or_another_text_is_refused(corpus, tmp_path):
    it = batches(corpus)
    next(it)
    with pytest.raises(ConfigError, match="the saved data position has 2 streams"):
        batches(corpus, dataclasses.replace(CONFIG, shards=4), state=it.state())
    (tmp_path / "new.txt").write_bytes(b"more text")
    with pytest.raises(ConfigError, match="the training text has changed"):
        batches(open_corpus((f"{tmp_path}/*.txt",)), state=it.state())


def test_weighted_mixing(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * 3000)
    (tmp_path / "b.txt").write_bytes(b"b" * 3000)
    (tmp_path / "v.txt").write_bytes(b"v")
    config = dataclasses.replace(
        CONFIG, train=(f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"), weights=(3.0, 1.0), valid=(f"{tmp_path}/v.txt",)
    )
    sources, valid = load_text(config)
    it = Batches(sources, config, FLAT_IDS, seed=0)
    counts = sum(np.bincount(next(it)["targets"].ravel(), minlength=257) for _ in range(120))
    assert counts[ord("a")] / (counts[ord("a")] + counts[ord("b")]) == pytest.approx(0.75, abs=0.02)
    assert valid.read(0) == b"v"
    with pytest.raises(ConfigError, match=r"name the held-out text in data\.valid"):
        load_text(dataclasses.replace(config, valid=()))


WORKERS = """
import json, sys
from bytelm.config import DataConfig
from bytelm.data.pipeline import Batches
from bytelm.data.sources import open_corpus
from bytelm.vocab import FLAT_IDS

if __name__ == "__main__":
    corpus = open_corpus((sys.argv[1],))
    def open_with(workers, state=None):
        config = DataConfig(seq_len=16, batch_size=8, shards=4, piece_bytes=20, workers=workers)
        return Batches([corpus], config, FLAT_IDS, seed=0, state=state)
    none, two, four = open_with(0), open_with(2), open_with(4)
    for i in range(9):
        a, b, c = next(none), next(two), next(four)
        assert all((a[k] == b[k]).all() and (a[k] == c[k]).all() for k in a), i
    assert none.state() == two.state() == four.state()
    resumed = open_with(1, json.loads(json.dumps(two.state())))
    for i in range(5):
        a, b = next(none), next(resumed)
        assert all((a[k] == b[k]).all() for k in a), i
    for it in (two, four, resumed):
        it.close()
    print("equal")
"""


def test_workers_do_not_change_batches_or_resume(corpus, tmp_path, root):
    """In a process of its own: grain's workers are spawned and need a main module they can import."""
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    done = subprocess.run(
        [sys.executable, str(script), f"{tmp_path}/*.txt"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
