"""Patches by entropy from training to decoding: stored and found in the step, one document and many, commands."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bytelm
from bytelm import codec
from bytelm.cli import run as cli
from bytelm.config import ConfigError, StackConfig
from bytelm.data.marks import StoredMarks
from bytelm.data.pipeline import load_text
from bytelm.data.readers import DataError
from bytelm.metrics import read_metrics
from bytelm.models.build import build
from bytelm.train.loop import train
from bytelm.train.patches import choose, entropies, load_patcher, patch_lengths, stored
from tiny import LONG, blt, entropy, flat, hnet, run_config

STACK = StackConfig(layout="T2", d_model=16, num_heads=2, d_mlp=32, window=6)


@pytest.fixture(scope="module")
def patcher(tmp_path_factory):
    """A run of a flat model with windows."""
    run = tmp_path_factory.mktemp("patcher") / "run"
    config = run_config(run, steps=60, optim={"lr": 1e-2}, train={"log_every": 60}, checkpoint={"every": 60})
    train(dataclasses.replace(config, model=flat(STACK, init_std=0.0)))
    return run


@pytest.fixture(scope="module")
def rule(patcher):
    return load_patcher(str(patcher), entropy(threshold=3.0))


def patch_run(run, patcher, model, cache, **sections):
    sections["train"] = {"patcher": str(patcher), **sections.get("train", {})}
    sections["data"] = {"cache_dir": str(cache), **sections.get("data", {})}
    return dataclasses.replace(run_config(run, **sections), model=model)


@pytest.mark.slow
def test_stored_patches_are_those_that_the_network_finds(patcher, rule, tmp_path):
    """Of documents of many lengths, also such as are read in several stretches: stored, in one pass, byte by byte."""
    config, params = rule
    rng = np.random.default_rng(0)
    texts = [bytes(rng.integers(32, 123, n).astype(np.uint8)) for n in (1, 2, 11, 30, 1500, 3000)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t.decode()}) + "\n" for t in texts))
    data = run_config("x", data={"train": (str(tmp_path / "t.jsonl"),), "valid": ("bundled:shakespeare[:99]",)}).data
    (corpus,) = load_text(data)[0]
    found = np.sort(np.concatenate([e[1:] for *_, e in entropies(corpus, config, params)]))
    middle = found[len(found) // 3 : 2 * len(found) // 3]
    gap = np.argmax(np.diff(middle))  # no entropy is near the threshold, so that the order of sums decides nothing
    config = dataclasses.replace(config, threshold=float(middle[gap : gap + 2].mean()), max_patch=9)
    path = stored(corpus, config, params, str(tmp_path / "cache"), lambda note: None)
    assert stored(corpus, config, params, str(tmp_path / "cache"), lambda note: pytest.fail("made twice")) == path
    marks = StoredMarks(corpus, path)
    network = build(blt(patcher=config), jax.random.key(0))
    nnx.update(network.patcher, params)
    with open(path, "rb") as file:
        assert len(file.read()) == corpus.total_bytes
    for document, text in enumerate(texts):
        ids = jnp.asarray([[256, *text]], jnp.int32)
        want, half = np.asarray(network.patcher.fires(ids))[0, 1:], len(text) // 2
        np.testing.assert_array_equal(marks.read(document, 0, text, text) > 0, want)
        np.testing.assert_array_equal(marks.read(document, half, text[half:], text[half:]) > 0, want[half:])
        if len(text) == 1500:
            state, stepped = network.patcher.no_bytes(1, 200), []
            read = jax.jit(network.patcher.read)
            for x in ids[0, :200]:
                state = read(x[None], state)
                stepped.append(bool(state.next[0]))
            np.testing.assert_array_equal(stepped[1:], want[:199])
    with pytest.raises(DataError, match="set data.marks=step"):
        marks.read(0, 0, b"a", b"abc")


@pytest.mark.slow
def test_a_run_with_stored_patches_equals_one_that_finds_them(patcher, tmp_path):
    losses = []
    for marks in ("stored", "step"):
        model = blt(patcher=entropy(threshold=2.9))
        config = patch_run(
            tmp_path / marks, patcher, model, tmp_path / "cache", steps=3, data={"marks": marks, "piece_bytes": 4096}
        )
        train(dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=64)))
        losses.append([r["loss"] for r in read_metrics(tmp_path / marks / "metrics.jsonl") if "loss" in r])
    # Rows that begin inside a document know less of it in the step: the first bytes' patches may differ.
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("model", [blt(), pytest.param(hnet(1, chunker="entropy"), marks=LONG)], ids=lambda m: m.family)
def test_commands(patcher, tmp_path, model, capsys):
    """Choose a threshold, train with workers, stop, go on, ask, convert."""
    assert cli(["patches", str(patcher), "bundled:shakespeare[:20000]", "--size", "3", "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)
    assert chosen["bytes_per_patch"] == pytest.approx(3, abs=0.02)
    assert cli(["patches", str(patcher), "bundled:shakespeare[:20000]", "--rule", "rise"]) == 0
    assert "--model.patcher.rule rise --model.patcher.rise" in capsys.readouterr().out
    model = dataclasses.replace(model, patcher=entropy(threshold=chosen["threshold"]))
    run = tmp_path / "run"
    config = patch_run(run, patcher, model, tmp_path / "cache", steps=3, data={"workers": 2})
    train(config)
    before = bytelm.load(run).params["patcher"]
    further = dataclasses.replace(config.train, steps=5)
    with pytest.raises(ConfigError, match="goes on with --train.patcher ''"):
        train(dataclasses.replace(config, train=dataclasses.replace(further, patcher=str(tmp_path / "gone"))))
    saved = codec.load(run / "config.yaml")  # which knows the entropy model's shape
    result = train(dataclasses.replace(saved, train=dataclasses.replace(further, patcher="")))
    lm = bytelm.load(run)
    assert result.step == 5 and lm.config.patcher.stack == STACK
    jax.tree.map(np.testing.assert_array_equal, lm.params["patcher"], before)
    record = [r for r in read_metrics(run / "metrics.jsonl") if "loss" in r][-1]
    assert 2 < record["level0/bytes_per_chunk"] < 4.5
    text = "To be (or not) 你好".encode()
    after = lm.logprobs_batch([text[:i] for i in range(len(text))])
    np.testing.assert_allclose(lm.score(text).per_byte, after[np.arange(len(text)), list(text)], atol=1e-4)
    assert lm.generate_batch([text, b""], 12, temperature=0) == [lm.generate(p, 12, temperature=0) for p in (text, b"")]
    assert len(lm.chunks(text)[0]) > 2
    assert cli(["convert", str(run), str(tmp_path / "weights")]) == 0
    np.testing.assert_array_equal(bytelm.load(tmp_path / "weights").logprobs(text), lm.logprobs(text))


@pytest.mark.slow
def test_entropy_in_the_place_of_another_rule(patcher, tmp_path):
    """A run goes on with other chunks: the new part comes from train.patcher, and must."""
    train(dataclasses.replace(run_config(tmp_path / "words", steps=2), model=hnet(1, chunker="words")))
    model, cache = hnet(1, chunker="entropy", patcher=entropy(threshold=2.9)), tmp_path / "cache"
    start = {"init_from": str(tmp_path / "words")}
    with pytest.raises(ConfigError, match="train.patcher is not set"):
        train(patch_run(tmp_path / "a", "", dataclasses.replace(model, patcher=entropy()), cache, train=start))
    train(patch_run(tmp_path / "b", patcher, model, cache, steps=1, train=start))
    stack = bytelm.load(patcher).params["stack"]
    jax.tree.map(np.testing.assert_array_equal, bytelm.load(tmp_path / "b").params["patcher"]["stack"], stack)


def test_what_does_not_fit(patcher, tmp_path, capsys):
    with pytest.raises(ConfigError, match="train.patcher is not set"):
        train(patch_run(tmp_path / "a", "", blt(), tmp_path / "cache"))
    with pytest.raises(ConfigError, match="has no patches by entropy"):
        train(patch_run(tmp_path / "b", patcher, flat(), tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"train.patcher=.*/none"):
        train(patch_run(tmp_path / "c", tmp_path / "none", blt(), tmp_path / "cache"))
    for size in ("1", "nan", "9000"):
        assert cli(["patches", str(patcher), "bundled:shakespeare[:2000]", "--size", size]) == 2
    (tmp_path / "ab.txt").write_text("ab" * 2000)
    assert cli(["patches", str(patcher), str(tmp_path / "ab.txt"), "--size", "4.5"]) == 2
    assert cli(["patches", str(tmp_path / "none"), "bundled:shakespeare[:2000]"]) == 2
    (tmp_path / "empty.txt").write_text("")
    assert cli(["patches", str(patcher), str(tmp_path / "empty.txt")]) == 2
    said = capsys.readouterr().err
    assert "--size 1: must be above 1" in said and said.count("no threshold of this rule gives such patches") == 2
    bad = tmp_path / "marks.npy"
    bad.write_bytes(b"x")
    (corpus,) = load_text(run_config("x").data)[0]
    with pytest.raises(DataError, match=r"marks.npy: holds 1 marks, the text needs 50,000"):
        StoredMarks(corpus, bad)
    with pytest.raises(DataError, match="cannot be read"):
        StoredMarks(corpus, tmp_path / "nothing.marks")
    assert cli(["plan", "configs/blt_tiny.yaml", "--train.patcher", str(patcher)]) == 0
    assert (
        "11,344" not in capsys.readouterr().out and cli(["plan", "configs/blt_tiny.yaml", "--train.patcher", "no"]) == 2
    )


def test_lengths_and_thresholds():
    """Against patches counted one by one, with cuts by length, over stretches and documents."""
    rng = np.random.default_rng(0)
    found = [(0, 0, rng.random(301)), (0, 300, rng.random(201)), (1, 0, rng.random(2)), (2, 0, rng.random(51))]
    found = [(d, b, e.astype(np.float32)) for d, b, e in found]
    for name, longest in (("threshold", 0), ("threshold", 7), ("rise", 0), ("both", 0)):
        rule = choose(entropy(rule=name, max_patch=longest), 4.0, found)
        lengths = patch_lengths(rule, found)
        assert lengths.mean() == pytest.approx(4.0, rel=0.02)
        assert lengths.sum() == 500 + 1 + 50 and lengths.min() > 0 and (not longest or lengths.max() <= longest)
    with pytest.raises(ConfigError, match="no threshold"):
        choose(entropy(max_patch=3), 4.0, found)
