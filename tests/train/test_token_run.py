"""Models of tokens, which byte models are compared with: tokens and pieces, the run, its byte view, files."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import bytelm
from bytelm.byteview.dropout import MergeDropout
from bytelm.byteview.tokenizer_files import tokenizer_hash
from bytelm.cli import run as cli
from bytelm.cli_model import convert
from bytelm.codec import dumps
from bytelm.config import Config, ConfigError, StackConfig, TokensConfig
from bytelm.data.pipeline import Batches, load_text
from bytelm.data.readers import DataError
from bytelm.data.tokens import RandomSplits, TokenPieces
from bytelm.metrics import read_metrics
from bytelm.plan import make_plan
from bytelm.train.loop import train
from bytelm.train.tokens import _stretches, open_tokenizer, text_tokens
from tiny import run_config

pytestmark = pytest.mark.slow  # one run is trained for all of them

STACK = StackConfig(layout="T2", d_model=32, num_heads=4, num_kv_heads=2, d_mlp=48)
MODEL = TokensConfig(stack=STACK, vocabulary=320, init_std=0.0)
TEXTS = ["A first text.", "x", "Zwölf Boxkämpfer — größer!", "many\n\nlines\tand  spaces " * 9, "naïve 北京 😀" * 5]
quiet = lambda note: None  # noqa: E731


def token_run(run_dir, cache, model=MODEL, data=None, **sections) -> Config:
    config = dataclasses.replace(run_config(run_dir, **sections), model=model)
    fields = {"cache_dir": str(cache), "seq_len": 24, **(data or {})}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture(scope="module")
def run(place):
    """A run of 40 steps, and its config."""
    config = token_run(place / "run", place / "cache", steps=40, optim={"lr": 1e-2}, checkpoint={"every": 20})
    return config, train(config)


@pytest.fixture(scope="module")
def texts(place, run):
    """A corpus of short documents, with the run's tokenizer and its tokens."""
    (place / "t.jsonl").write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in TEXTS))
    config = token_run(
        place / "run", place / "cache", data={"train": (str(place / "t.jsonl"),), "valid": ("bundled:shakespeare[:9]",)}
    )
    (corpus,) = load_text(config.data)[0]
    begun = tokenizer_hash(place / "run" / "tokenizer.json")
    tokenizer = open_tokenizer(config, place / "run", [corpus], begun, lambda note: pytest.fail("learned twice"))
    return config, corpus, tokenizer, text_tokens(tokenizer, [corpus], str(place / "cache"), quiet)[0]


def losses(run_dir):
    return {r["step"]: r["loss"] for r in read_metrics(run_dir / "metrics.jsonl") if "loss" in r}


def logits_of(lm, ids):
    network = nnx.merge(lm.model.graph, lm.model.params)
    return np.asarray(network(jnp.asarray(ids, jnp.int32)[None]))[0]


def test_tokens_of_a_text_are_the_tokenizers_package_own(texts):
    tokenizers = pytest.importorskip("tokenizers")
    _, _, tokenizer, stored = texts
    theirs = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    assert len(tokenizer.ids.widths) <= MODEL.vocabulary
    for document, text in enumerate(TEXTS):
        assert stored.read(document).tolist() == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_pieces_predict_every_token_once_and_say_where_they_are_from(texts, piece):
    _, corpus, tokenizer, stored = texts
    pieces = TokenPieces(corpus, stored, piece, first=5)
    assert int(pieces.ends[-1]) == len(pieces)
    found, text = [[] for _ in TEXTS], [b""] * len(TEXTS)
    for i in range(len(pieces)):
        document = int(np.searchsorted(pieces.ends, i, side="right"))
        table = pieces[i]["columns"]
        assert table.shape[1] == 4 and (table[:, 2] == 5 + i).all() and len(table) <= piece
        body = b"".join(tokenizer.vocabulary.tokens[t] or b"" for t in table[:, 1])
        assert table[:, 3].sum() == len(body)
        _, _, stretch = pieces.where(i).rpartition("[")
        begin, end = map(int, stretch[:-1].split(":"))
        assert corpus.read(document)[begin:end] == body
        assert table[0, 0] == (found[document][-1] if found[document] else tokenizer.ids.start)
        assert (table[1:, 0] == table[:-1, 1]).all()
        found[document] += table[:, 1].tolist()
        text[document] += body
    assert text == [t.encode() for t in TEXTS]
    for document, ids in enumerate(found):
        assert ids == [*stored.read(document).tolist(), tokenizer.ids.end]


@pytest.mark.parametrize(
    "text,lengths",
    [
        ("", [0]),
        ("words and words " * 500, [8000]),
        ("x" * 1024 + " y", [1026]),
        ("a word " + "01" * 1500 + " end" + "\n" * 1100, [1031, 1024, 952 + 4 + 1024, 76]),
    ],
)
def test_only_very_long_words_are_cut_for_learning(text, lengths):
    found = list(_stretches(text))
    assert "".join(found) == text and [len(part) for part in found] == lengths


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60), share=st.floats(0, 3), seed=st.integers(0, 99))
def test_other_tokens_have_the_same_bytes(texts, text, share, seed):
    _, _, tokenizer, _ = texts
    names, ids = tokenizer.vocabulary.tokens, np.array(tokenizer.encode(text.encode(), "here"), np.int32)
    join = lambda ids: b"".join(names[i] for i in ids)  # noqa: E731
    split = RandomSplits(names, share)
    out = split(ids, np.random.default_rng(seed))
    assert join(out) == text.encode() and len(ids) <= len(out) <= len(ids) + int(share * len(ids))
    np.testing.assert_array_equal(out, split(ids, np.random.default_rng(seed)))
    dropout = MergeDropout(tokenizer.path, min(share / 3, 0.99))
    for first in range(min(len(ids), 3)):  # pieces that begin and end inside characters, too
        part = ids[first : len(ids) - first]
        assert join(dropout(part, np.random.default_rng(seed))) == join(part)
    if share == 0:
        np.testing.assert_array_equal(out, ids)
        np.testing.assert_array_equal(dropout(ids, np.random.default_rng(seed)), ids)


def test_dropped_merges_leave_single_bytes_or_all(texts):
    """Nearly every merge left out: bytes; and the share of text in single bytes grows with the dropout."""
    _, _, tokenizer, _ = texts
    ids = np.array(tokenizer.encode(b"the other brother and another mother " * 20, "here"), np.int32)
    counts = [len(MergeDropout(tokenizer.path, p)(ids, np.random.default_rng(0))) for p in (0.0, 0.1, 0.5, 0.999)]
    assert counts[0] == len(ids) and counts == sorted(counts) and counts[1] > 1.02 * counts[0]
    assert counts[-1] > 0.97 * 37 * 20


def test_bytes_seen_are_those_of_the_text(run, place):
    config, result = run
    records = read_metrics(result.run_dir / "metrics.jsonl")
    step = [r for r in records if "loss" in r]
    width = step[-1]["bytes_per_token"]
    assert 1.5 < width < 4
    assert step[-1]["bpb"] == pytest.approx(step[-1]["loss"] / math.log(2) / width)
    (corpus,) = load_text(config.data)[0]
    assert step[-1]["bytes"] == pytest.approx(40 * config.data.batch_size * 24 * width, rel=0.1)
    assert step[-1]["bpb"] < step[0]["bpb"] - 0.5
    assert corpus.total_bytes > step[-1]["bytes"]


def test_held_out_figure_is_that_of_the_loaded_model(run):
    """Of the tokenizer's tokens, in the windows of training: what the byte view's plain tokens give."""
    config, result = run
    held = load_text(config.data)[1]
    lm = bytelm.load(result.run_dir)
    text = held.read(0)[: result.heldout.bytes]
    ids = np.array(lm.token_ids(text))
    total = 0.0
    for begin in range(0, len(ids), 24):
        first = max(min(begin, len(ids) - 24), 0)
        row = ids[first : first + 24]
        before = lm.vocabulary.start if first == 0 else ids[first - 1]
        inputs = np.concatenate([[before], row[:-1]])
        logits = logits_of(lm, inputs).astype(np.float64)
        logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        total -= logs[np.arange(len(row)), row][begin - first :].sum()
    assert result.heldout.bpb == pytest.approx(total / math.log(2) / len(text), abs=1e-5)


@pytest.mark.parametrize("drawn", [{}, {"token_splits": 0.5}, {"merge_dropout": 0.2}])
def test_resume_and_worker_processes_change_nothing(run, place, drawn):
    config, _ = run
    config = token_run(place / "run", place / "cache", data={**drawn, "shards": 2, "batch_size": 2})
    sources = load_text(config.data)[0]
    begun = tokenizer_hash(place / "run" / "tokenizer.json")
    tokenizer = open_tokenizer(config, place / "run", sources, begun, quiet)
    tokens, recut = text_tokens(tokenizer, sources, str(place / "cache"), quiet), tokenizer.recut(config.data)

    def batches(data=config.data, state=None):
        return Batches(sources, data, None, seed=0, tokens=tokens, recut=recut, state=state)

    whole = batches()
    want = [next(whole) for _ in range(8)]
    again = batches()
    for _ in range(3):
        next(again)
    resumed = batches(state=json.loads(json.dumps(again.state())))
    apart = batches(dataclasses.replace(config.data, workers=2))
    rest = [next(apart) for _ in range(8)]
    apart.close()
    for a, b in [*zip(want, rest, strict=True), *zip(want[3:], [next(resumed) for _ in range(5)], strict=True)]:
        for name in ("inputs", "targets", "segments", "widths"):
            np.testing.assert_array_equal(a[name], b[name])
    if drawn:
        plain = Batches(sources, config.data, None, seed=0, tokens=tokens)
        assert any((next(plain)["targets"] != one["targets"]).any() for one in want)


def test_a_run_goes_on_to_the_same_losses(run, place):
    _, result = run
    half = token_run(place / "half", place / "cache", steps=40, optim={"lr": 1e-2}, checkpoint={"every": 20})
    code = (
        "import os, sys, bytelm.train.loop as loop; from bytelm import codec; from bytelm.metrics import MetricsLog\n"
        "write = MetricsLog.write\n"
        "def dying(self, record):\n"
        "    write(self, record)\n"
        "    if record.get('step') == 25: os.kill(os.getpid(), 9)\n"
        "MetricsLog.write = dying\n"
        "loop.train(codec.load(sys.argv[1]))\n"
    )
    half = dataclasses.replace(half, train=dataclasses.replace(half.train, log_every=5))
    (place / "half.yaml").write_text(dumps(half))
    assert subprocess.run([sys.executable, "-c", code, str(place / "half.yaml")]).returncode == -9
    assert (place / "half" / "tokenizer.json").read_bytes() == (place / "run" / "tokenizer.json").read_bytes()
    train(half)
    mine, whole = losses(place / "half"), losses(result.run_dir)
    assert mine[40] == whole[40] and len(mine) >= 8


def test_converted_folder_gives_the_same_probabilities(run, place):
    _, result = run
    assert cli(["convert", str(result.run_dir), str(place / "folder")]) == 0
    a, b = bytelm.load(result.run_dir), bytelm.load(place / "folder")
    for prompt in (b"", b"The qu", "naï".encode(), b"What is the w"):
        np.testing.assert_allclose(a.logprobs(prompt), b.logprobs(prompt), atol=1e-5)
    assert a.generate(b"And ", max_bytes=12, seed=3) == b.generate(b"And ", max_bytes=12, seed=3)


@pytest.mark.parametrize("fields", [{}, {"window": 8}, {"qk_norm": "head"}, {"rope_stretch": (4.0, 1.0, 4.0, 16.0)}])
def test_transformers_reads_what_is_converted(reference_python, run, place, fields, tmp_path):
    """The logits of a text are those of the run, in every kind of block that can be written."""
    stack = dataclasses.replace(STACK, **fields)
    model = dataclasses.replace(MODEL, stack=stack, tie_embeddings=bool(fields))
    config = token_run(
        tmp_path / "run", place / "cache", model, steps=2, data={"tokenizer": str(place / "run/tokenizer.json")}
    )
    train(config)
    assert cli(["convert", str(tmp_path / "run"), str(tmp_path / "folder")]) == 0
    code = (
        "import sys, torch, numpy as np, transformers\n"
        "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation='eager').eval()\n"
        "ids = torch.arange(1, 21)[None]\n"
        "np.save(sys.argv[2], m(ids).logits.detach().numpy())\n"
    )
    subprocess.run([reference_python, "-c", code, str(tmp_path / "folder"), str(tmp_path / "x.npy")], check=True)
    lm = bytelm.load(tmp_path / "run")
    np.testing.assert_allclose(logits_of(lm, np.arange(1, 21)), np.load(tmp_path / "x.npy")[0], atol=2e-5)


def test_mistakes_are_named(run, place, tmp_path):
    config, _ = run
    with pytest.raises(ConfigError, match="not what the run began with"):
        (tmp_path / "other.json").write_text((place / "run/tokenizer.json").read_text() + "\n")
        other = {"tokenizer": str(tmp_path / "other.json")}
        train(token_run(place / "run", place / "cache", data=other, train={"allow_config_change": True}))
    with pytest.raises(ConfigError, match="no such file"):
        train(token_run(tmp_path / "a", place / "cache", data={"tokenizer": str(tmp_path / "none.json")}))
    with pytest.raises(ConfigError, match="is no tokenizer.json"):
        (tmp_path / "bad.json").write_text("{}")
        train(token_run(tmp_path / "b", place / "cache", data={"tokenizer": str(tmp_path / "bad.json")}))
    assert not (tmp_path / "b" / "tokenizer.json").exists()
    with pytest.raises(ConfigError, match="model.vocabulary=300: .* 320 tokens"):
        small = dataclasses.replace(MODEL, vocabulary=300)
        train(token_run(tmp_path / "c", place / "cache", small, data={"tokenizer": str(place / "run/tokenizer.json")}))
    (tmp_path / "bytes.txt").write_bytes(b"good text " * 50 + b"\xff\xfe broken " * 50)
    with pytest.raises(DataError, match=r"bytes.txt.* byte 500 of the document is no UTF-8.*data.reserved=replace"):
        train(
            token_run(
                tmp_path / "d", place / "cache", data={"train": (str(tmp_path / "bytes.txt"),), "valid_fraction": 0.0}
            )
        )
    replaced = {"train": (str(tmp_path / "bytes.txt"),), "valid_fraction": 0.0, "reserved": "replace"}
    train(token_run(tmp_path / "d", place / "cache", data=replaced, steps=2))
    for bad in ({"layout": "m2"}, {"norm": "layer"}, {"mlp": "relu"}, {"rope_dim": 4}, {"qk_norm": "all"}):
        with pytest.raises(ConfigError, match=f"model.stack.{next(iter(bad))}"):
            TokensConfig(stack=dataclasses.replace(STACK, **bad))
    with pytest.raises(ConfigError, match="for model.family=tokens"):
        dataclasses.replace(config, model=bytelm.Config().model, data=dataclasses.replace(config.data, tokenizer="x"))
    with pytest.raises(ConfigError, match="choose one"):
        dataclasses.replace(config.data, token_splits=0.1, merge_dropout=0.1)
    with pytest.raises(ConfigError, match="is no H-Net"):
        convert([str(place / "run"), str(tmp_path / "h"), "--to", "hnet"])


def test_a_tokenizer_stays_with_its_weights(run, place, tmp_path):
    """One left by a start that trained nothing is made anew for another vocabulary or text; under trained weights it
    must be the one they were trained with, in the run, when loading and when starting from them."""
    _, result = run
    shutil.copytree(place / "run", tmp_path / "moved")
    for name in ("checkpoints", "best"):
        shutil.rmtree(tmp_path / "moved" / name)
    larger = dataclasses.replace(MODEL, vocabulary=400)
    train(token_run(tmp_path / "moved", place / "cache", larger, steps=2))
    again = json.loads((tmp_path / "moved" / "tokenizer.json").read_text())
    assert len(again["model"]["vocab"]) == 400
    lm = bytelm.load(tmp_path / "moved" / "checkpoints" / "2")
    assert len(lm.vocabulary.tokens) == 400
    with monkey_dir(tmp_path / "moved" / "checkpoints"):
        assert len(bytelm.load("2").vocabulary.tokens) == 400
    (tmp_path / "moved" / "tokenizer.json").write_bytes((place / "run" / "tokenizer.json").read_bytes())
    with pytest.raises(bytelm.checkpoint.CheckpointError, match="not the one that its weights were trained with"):
        bytelm.load(tmp_path / "moved")
    with pytest.raises(ConfigError, match="is not what the weights of this run were trained with"):
        train(token_run(tmp_path / "moved", place / "cache", larger, steps=4))
    (tmp_path / "moved" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="is not there any more, but the weights"):
        train(token_run(tmp_path / "moved", place / "cache", larger, steps=4))
    start = {"init_from": str(place / "run")}
    with pytest.raises(ConfigError, match="is not what the weights of train.init_from are for"):
        other = tmp_path / "other.json"
        other.write_text((place / "run/tokenizer.json").read_text() + "\n")
        train(token_run(tmp_path / "from", place / "cache", data={"tokenizer": str(other)}, train=start, steps=2))
    train(
        token_run(
            tmp_path / "from", place / "cache", train=start, steps=2, data={"train": ("bundled:shakespeare[:9000]",)}
        )
    )
    assert (tmp_path / "from" / "tokenizer.json").read_bytes() == (place / "run" / "tokenizer.json").read_bytes()
    for option in ({"draft": "own"}, {"wait": 0.5}, {"deletion": "hard"}, {"reserved": "replace"}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            bytelm.load(result.run_dir, **option)


@contextlib.contextmanager
def monkey_dir(path):
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def test_commands_know_tokens(run, place, tmp_path, capsys):
    """A run's figure comes again, on text that is no UTF-8 too; plans count bytes; a dry run reads the tokenizer."""
    _, result = run
    (tmp_path / "v.txt").write_bytes(b"some held-out text \xff and more of it " * 9)
    data = {"valid": (str(tmp_path / "v.txt"),), "reserved": "replace", "tokenizer": str(place / "run/tokenizer.json")}
    config = token_run(tmp_path / "r", place / "cache", data=data, steps=2, eval={"final_max_bytes": 0, "max_bytes": 0})
    found = train(config)
    capsys.readouterr()
    assert cli(["eval", str(tmp_path / "r"), "--json"]) == 0
    # In one window, as the run scored it: its rows are shorter.
    assert json.loads(capsys.readouterr().out)["bpb"] == pytest.approx(found.heldout.bpb, rel=0.2)
    assert cli(["eval", str(result.run_dir), "--text", str(tmp_path / "v.txt")]) == 2
    assert "no UTF-8" in capsys.readouterr().err
    with pytest.raises(DataError, match="v.txt.*no UTF-8"):
        train(dataclasses.replace(config, data=dataclasses.replace(config.data, reserved="error"),
                                  train=dataclasses.replace(config.train, run_dir=str(tmp_path / "s"))))  # fmt: skip
    assert make_plan(config).bytes_per_step == round(3.5 * 8 * 24)
    (tmp_path / "c.yaml").write_text(
        dumps(dataclasses.replace(config, model=dataclasses.replace(MODEL, vocabulary=300)))
    )
    assert cli(["train", str(tmp_path / "c.yaml"), "--dry-run"]) == 2
    assert "model.vocabulary=300" in capsys.readouterr().err
