"""Training HAT, SpaceByte and MegaByte: meshes, resuming, slots, another rule from a checkpoint, commands."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import bytelm
from bytelm.cli import run as cli
from bytelm.config import CapacityConfig
from bytelm.data.marks import WordMarks
from bytelm.data.pipeline import Batches, load_text
from bytelm.metrics import read_metrics
from bytelm.models.build import byte_ids, word_rule
from bytelm.parallel.mesh import make_mesh
from bytelm.train.loop import train
from bytelm.train.state import init_state, plan_state
from bytelm.train.step import make_train_step, place_batch
from tiny import LONG, hat, megabyte, run_config, spacebyte


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def word_run(run_dir, model, **sections):
    return dataclasses.replace(run_config(run_dir, **sections), model=model)


def losses(run_dir):
    return {r["step"]: r["loss"] for r in read_metrics(run_dir / "metrics.jsonl") if "loss" in r}


def steps_on(model, mesh_sizes, devices):
    config = word_run("unused", model, mesh=mesh_sizes)
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    sources = load_text(config.data)[0]
    batches = Batches(
        sources,
        config.data,
        byte_ids(model),
        seed=0,
        marks=[WordMarks(corpus, word_rule(model)) for corpus in sources] if model.family == "hat" else [],
    )
    with jax.set_mesh(mesh):
        setup = plan_state(config, mesh)
        state, step = init_state(config, setup), make_train_step(config, setup)
        out = []
        for _ in range(5):
            state, metrics = step(state, place_batch(next(batches), mesh), (16,))
            out.append([float(metrics[name]) for name in ("nll", "level0/bytes_per_chunk", "level0/dropped")])
    return np.array(out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [hat(), pytest.param(spacebyte(), marks=LONG), pytest.param(megabyte(), marks=LONG)],
    ids=lambda m: m.family,
)
def test_meshes_equal_one_device(model):
    want = steps_on(model, {"data": 1}, 1)
    for fsdp, tensor in ((2, 4), (4, 2)):
        got = steps_on(model, {"data": 1, "fsdp": fsdp, "tensor": tensor}, 8)
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["released", "strict"])
def test_stopping_and_going_on_changes_nothing(tmp_path, guide):
    model = hat(guide=guide, capacity=CapacityConfig(start=(0.5,), every=3, multiple=4))
    train(word_run(tmp_path / "whole", model, train={"steps": 8}))
    train(word_run(tmp_path / "parts", model, train={"steps": 8}, checkpoint={"every": 4}))
    whole = losses(tmp_path / "whole")
    assert whole == losses(tmp_path / "parts") and len(whole) == 8
    shutil.rmtree(tmp_path / "parts/checkpoints/8")  # the run goes on from the one before
    train(word_run(tmp_path / "parts", model, train={"steps": 8}, checkpoint={"every": 4}))
    assert losses(tmp_path / "parts") == whole


@pytest.mark.slow
def test_another_rule_from_a_checkpoint(tmp_path):
    """White space to Unicode in the middle of a run: the step goes on, words get shorter."""
    run = tmp_path / "run"
    train(word_run(run, hat(rule="space"), train={"steps": 4}))
    longer = {r["step"]: r["level0/bytes_per_chunk"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r}
    model = dataclasses.replace(hat(), rule="unicode")
    result = train(word_run(run, model, train={"steps": 8, "allow_config_change": True}))
    records = [r for r in read_metrics(run / "metrics.jsonl") if "loss" in r]
    assert result.step == 8 and [r["step"] for r in records] == list(range(1, 9))
    assert np.isfinite([r["loss"] for r in records]).all()
    assert max(r["level0/bytes_per_chunk"] for r in records[4:]) < min(longer.values())


@pytest.mark.slow
@pytest.mark.parametrize("model", [hat(), spacebyte(), megabyte()], ids=lambda m: m.family)
def test_commands(tmp_path, model, capsys):
    """A run of each family answers as every byte model does."""
    run = tmp_path / "run"
    train(word_run(run, model, train={"steps": 2}))
    text = "Größe (of 3): 你好".encode()
    lm = bytelm.load(run)
    after = lm.logprobs_batch([text[:i] for i in range(len(text))])
    np.testing.assert_allclose(lm.score(text).per_byte, after[np.arange(len(text)), list(text)], atol=1e-4)
    np.testing.assert_allclose(np.exp(after).sum(axis=1), 1, atol=1e-9)
    alone = [lm.generate(p, 24, temperature=0) for p in (text[:4], text, b"")]
    assert lm.generate_batch([text[:4], text, b""], 24, temperature=0) == alone
    (starts,) = lm.chunks(text)
    if model.family == "hat":
        np.testing.assert_array_equal(starts, bytelm.data.words.split_bytes(text, max_bytes=12))
    capsys.readouterr()
    (tmp_path / "t.txt").write_bytes(text)
    assert cli(["eval", str(run), "--text", str(tmp_path / "t.txt"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["family"] == model.family and record["bpb"] == pytest.approx(
        -lm.score(text).total / np.log(2) / len(text)
    )
    assert ("bpb_released" in record) == (model.family == "hat")
    assert cli(["convert", str(run), str(tmp_path / "weights")]) == 0
    np.testing.assert_array_equal(bytelm.load(tmp_path / "weights").logprobs(text), lm.logprobs(text))
    assert cli(["plan", str(run / "config.yaml")]) == 0
