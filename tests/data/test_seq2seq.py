"""Span corruption, diagnostics, pairs, and their batches."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelm.config import Config, ConfigError, DataConfig, FlatConfig, T5Config
from bytelm.data.diagnostics import DIAGNOSTICS, diagnostic_text, rewrite
from bytelm.data.pipeline import Batches, load_text
from bytelm.data.readers import DataError
from bytelm.data.seq2seq import (
    SpanExamples,
    heldout_examples,
    heldout_rows,
    make_row,
    target_length,
    to_ids,
    training_examples,
)
from bytelm.data.sources import open_corpus
from bytelm.data.spans import FIRST_SENTINEL, corrupt, noise_mask, span_lengths
from bytelm.vocab import T5_IDS


def traces(root, name):
    return json.loads((root / f"tests/golden/mrt5/traces/{name}.json").read_text())


def test_spans_are_the_reference_s(root):
    found = traces(root, "span_corruption")
    for name, wanted in found["lengths"].items():
        row, density, mean = name.split(",")
        assert list(span_lengths(int(row), float(density), float(mean))) == wanted
    assert len(found["cases"]) == 4
    for case in found["cases"]:
        source, target = corrupt(np.array(case["raw"], np.int32), np.array(case["noise_mask"], bool))
        assert source.tolist() == case["input_ids"]
        assert target.tolist() == case["labels"]


def restore(source, target):
    """The text of a corrupted pair: each sentinel of one is what stands behind the same one in the other."""
    out, at = [], 0
    noise: dict[int, list[int]] = {}
    for i in target[:-1]:
        if i > 240:
            at = int(i)
            noise[at] = []
        else:
            noise[at].append(int(i))
    # The target starts with the sentinel of the first clean span, whose noise follows it.
    taken = list(noise.values())
    for i in source[:-1]:
        if i > 240:
            out += taken.pop(0)
        else:
            out.append(int(i))
    return out


@settings(deadline=None, max_examples=150)
@given(row=st.integers(8, 300), density=st.floats(0.02, 0.8), mean=st.floats(1.0, 40.0), seed=st.integers(0, 2**32 - 1))
def test_corruption_loses_nothing_and_fills_its_row(row, density, mean, seed):
    length, targets = span_lengths(row, density, mean)
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 130, length).astype(np.int32)
    mask = noise_mask(length, density, mean, rng)
    assert not mask[0]
    source, target = corrupt(ids, mask)
    assert len(source) <= row
    assert len(target) == targets
    spans = int((mask[1:] & ~mask[:-1]).sum())
    if spans <= FIRST_SENTINEL - 241:
        assert restore(source, target) == ids.tolist()


def test_no_longer_text_would_fit():
    for row in (16, 64, 333, 1024):
        length, _ = span_lengths(row, 0.15, 20.0)
        noise = lambda n: round(0.15 * n)  # noqa: E731
        assert length - noise(length) + max(round(noise(length) / 20), 1) + 1 <= row
        assert length + 1 - noise(length + 1) + max(round(noise(length + 1) / 20), 1) + 1 > row


def test_diagnostics_are_the_reference_s_rules(root):
    names = {"vowels": "vowel_removal", "context_vowels": "contextual_vowel_removal", "merge": "merge_ABC",
             "copy": "copy"}  # fmt: skip
    for task in DIAGNOSTICS:
        cases = traces(root, "diagnostic")["tasks"][names[task]]
        assert len(cases) == 8
        for case in cases:
            assert rewrite(case["input"], task) == case["target"]


@pytest.mark.parametrize(("task", "mean"), [("vowels", 12.1), ("context_vowels", 12.5), ("merge", 9.8), ("copy", 0)])
def test_diagnostic_texts_give_the_rules_something_to_do(task, mean):
    rng = np.random.default_rng(0)
    texts = [diagnostic_text(task, 63, rng) for _ in range(2000)]
    assert all(len(text) == 63 and text[0] == "#" and text[1:].isalpha() for text in texts)
    gone = np.mean([63 - len(rewrite(text, task)) for text in texts])
    assert gone == pytest.approx(mean, abs=0.7)
    assert len(set(texts)) == 2000
    assert all(len(diagnostic_text(task, n, rng)) == n for n in (1, 2, 3, 7))


def spans(**fields) -> DataConfig:
    return DataConfig(task="spans", seq_len=48, batch_size=4, mean_span=5.0, **fields)


def test_span_examples_run_over_documents_with_their_ends(tmp_path):
    texts = ["one short", "another document, a bit longer", "x" * 100]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    corpus = open_corpus((str(tmp_path / "*.txt"),))
    examples = SpanExamples(corpus, spans())
    stream = b"\xff".join([*(t.encode() for t in texts), b""])  # the end symbol as 0xFF
    whole = np.concatenate([examples[i]["ids"] for i in range(len(examples))])
    assert len(examples) == len(stream) // examples.length > 1
    shown = bytes(255 if i == 1 else i - 3 for i in whole)
    assert shown == stream[: len(shown)]
    assert "0.txt[0:" in examples.where(0)
    assert "documents behind it" in examples.where(0)


@pytest.mark.parametrize("task", ["spans", "merge"])
def test_batches_resume_and_do_not_depend_on_workers(task):
    config = DataConfig(task=task, seq_len=48, batch_size=4, train=("bundled:shakespeare[:20000]",))
    sources, _ = load_text(config)
    plain = Batches(sources, config, T5_IDS, seed=1)
    batches = [next(plain) for _ in range(3)]
    state = json.loads(json.dumps(plain.state()))
    after = next(plain)
    import dataclasses

    for workers in (0, 2):
        other = Batches(sources, dataclasses.replace(config, workers=workers), T5_IDS, seed=1, state=state)
        again = next(other)
        other.close()
        assert all((after[name] == again[name]).all() for name in after)
    assert set(after) == {"source", "inputs", "targets", "segments", "pieces"}
    assert (batches[0]["source"] != batches[1]["source"]).any()
    assert len(plain.where(after)) == 4
    half = Batches(sources, config, T5_IDS, seed=1, rows=[1, 3])
    assert (next(half)["source"] == batches[0]["source"][[1, 3]]).all()
    with pytest.raises(ConfigError, match="does not fit"):
        Batches(sources, dataclasses.replace(config, target_len=99), T5_IDS, seed=1, state=state)


def test_rows_shift_and_pad():
    config = DataConfig(task="pairs", seq_len=8, target_len=6)
    row = make_row(to_ids(b"abc"), to_ids(b"xy"), config, 7)
    assert row["source"].tolist() == [100, 101, 102, 1, 0, 0, 0, 0]
    assert row["inputs"].tolist() == [0, 123, 124, 0, 0, 0]
    assert row["targets"].tolist() == [123, 124, 1, 0, 0, 0]
    assert row["segments"].tolist() == [1, 1, 1, 0, 0, 0]
    assert row["pieces"].tolist() == [7] * 6
    with pytest.raises(ConfigError, match="target_len"):
        make_row(to_ids(b"a"), to_ids(b"abcdef"), config, 0)


def pairs(tmp_path, text: bytes, **fields):
    (tmp_path / "pairs.tsv").write_bytes(text)
    config = DataConfig(task="pairs", train=(str(tmp_path / "pairs.tsv"),), seq_len=16, **fields)
    return config, load_text(config)


def test_pairs_are_read_unescaped_and_split(tmp_path):
    lines = [b"in %d\tout %d" % (i, i) for i in range(200)] + [b"a\\tb\\\\n\tc\\nd\r", b""]
    config, (sources, held) = pairs(tmp_path, b"\n".join(lines), valid_fraction=0.2, batch_size=4)
    (train,) = training_examples(sources, config)
    rows = list(heldout_rows(heldout_examples(held, config), config))
    assert len(train) + len(rows) == 201
    assert 20 < len(rows) < 60
    seen = {train.pairs[i][0] for i in range(len(train))}
    text = lambda row: bytes(i - 3 for i in row["source"] if i > 2)  # noqa: E731
    assert not seen & {text(row) for row in rows}
    both = dict(train.pairs) | {text(r): bytes(i - 3 for i in r["targets"] if i > 2) for r in rows}
    assert both[b"a\tb\\n"] == b"c\nd"


@pytest.mark.parametrize(
    ("line", "said"),
    [(b"no tab", "line 2: 0 tabs"), (b"a\tb\tc", "line 2: 2 tabs"), (b"x" * 16 + b"\ty", r"line 2: 16 bytes.*seq_len"),
     (b"x\t" + b"y" * 16, r"line 2: 16 bytes.*target_len")],
)  # fmt: skip
def test_bad_pairs_are_named(tmp_path, line, said):
    config, (sources, _) = pairs(tmp_path, b"good\tpair\n" + line, valid_fraction=0.0)
    with pytest.raises(DataError, match=said):
        training_examples(sources, config)


def test_long_pairs_are_cut_when_asked(tmp_path):
    config, (sources, _) = pairs(tmp_path, b"x" * 40 + b"\t" + b"y" * 40, valid_fraction=0.0, truncate=True)
    (train,) = training_examples(sources, config)
    assert train.pairs == [(b"x" * 15, b"y" * 15)]


def test_a_few_pairs_hold_out_one_and_many_spans_are_refused(tmp_path):
    config, (sources, held) = pairs(tmp_path, b"a\tb\nc\td\ne\tf", valid_fraction=1e-9)
    assert len(training_examples(sources, config)[0]) == 2
    assert len(heldout_examples(held, config)) == 1
    with pytest.raises(ConfigError, match="only 11 bytes never occur"):
        training_examples(load_text(spans())[0], DataConfig(task="spans", seq_len=1024, mean_span=3.0))


def test_tasks_go_with_encoder_decoders():
    assert target_length(spans()) == span_lengths(48, 0.15, 5.0)[1]
    with pytest.raises(ConfigError, match="only an encoder-decoder"):
        Config(model=FlatConfig(), data=spans())
    with pytest.raises(ConfigError, match="needs inputs and targets"):
        Config(model=T5Config(), data=DataConfig())


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("tiny")
    corpus = open_corpus((str(tmp_path / "a.txt"),))
    with pytest.raises(ConfigError, match="too little text"):
        training_examples([corpus], spans())
    with pytest.raises(ConfigError, match="at least 4"):
        span_lengths(3, 0.15, 20.0)
    with pytest.raises(ConfigError, match="there are 256 sentinels"):
        span_lengths(4096, 0.5, 1.0)
