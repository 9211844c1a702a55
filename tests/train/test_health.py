"""Batches whose loss or gradient is not finite: they change nothing, are named, and too many in a row end the run."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from bytelm.checkpoint import find_checkpoint, list_steps, read_meta, restore_params
from bytelm.metrics import read_metrics
from bytelm.models.build import structure
from bytelm.train import loop
from bytelm.train.loop import Diverged, train
from bytelm.train.state import init_state
from tiny import run_config

POISON = ord("z")  # a text with this byte gives NaN


@pytest.fixture
def poisoned(tmp_path, monkeypatch):
    """A config of a run in which z's embedding is not a number; its text has a z in one document of twelve."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def init(config, setup):
        state = init_state(config, setup)
        table = state["params"]["embed"]["table"]
        state["params"]["embed"]["table"] = jax.device_put(table.at[POISON].set(np.nan), table.sharding)
        return state

    monkeypatch.setattr(loop, "init_state", init)
    for i in range(12):
        (tmp_path / f"{i:02}.txt").write_bytes(b"abcdefgh" * 16 if i != 7 else b"abczdefg" * 16)
    (tmp_path / "valid.txt").write_bytes(b"abcdefgh" * 8)
    text = {"train": (f"{tmp_path}/??.txt",), "valid": (f"{tmp_path}/valid.txt",), "shuffle": False, "shards": 1}
    return run_config(tmp_path / "run", steps=24, data=text, train={"log_every": 5}, model={"tie_embeddings": False})


def records(run):
    found = read_metrics(run / "metrics.jsonl")
    return [r for r in found if r.get("event") == "skipped"], [r for r in found if "loss" in r and "event" not in r]


@pytest.mark.slow
def test_a_bad_batch_is_left_out_counted_and_named(poisoned, tmp_path, capsys):
    result = train(poisoned)
    skipped, logged = records(tmp_path / "run")
    assert result.step == 24 and 3 <= len(skipped) <= 12 and result.heldout.bpb < 8
    for record in skipped:
        assert any("07.txt[0:128]" in place for place in record["text"]) and len(record["text"]) <= 4
        assert record["in_row"] >= 1 and record["loss"] == "nan"
    assert logged[-1]["skipped"] == len(skipped) and all(np.isfinite(r["loss"]) for r in logged)
    assert not {r["step"] for r in skipped} & {r["step"] for r in logged}
    params = restore_params(find_checkpoint(tmp_path / "run"), structure(poisoned.model)[1])
    table = np.array(params["embed"]["table"])
    assert np.isnan(table[POISON]).all() and np.isfinite(np.delete(table, POISON, axis=0)).all()
    assert f"step {skipped[0]['step']}: loss nan" in capsys.readouterr().err
    assert read_meta(tmp_path / "run" / "checkpoints" / "24")["bytes"] == logged[-1]["bytes"]


def test_too_many_in_a_row_end_the_run(poisoned, tmp_path):
    config = dataclasses.replace(poisoned, train=dataclasses.replace(poisoned.train, max_skipped=1))
    with pytest.raises(Diverged, match=r"loss nan, gradient norm nan, 1 batches in a row .*07\.txt\["):
        train(config)
    first = records(tmp_path / "run")[0][0]["step"]
    saved = list_steps(tmp_path / "run" / "checkpoints")
    assert all(step < first - 1 for step in saved)  # nothing was saved after it, nor of the weights that gave it
    aside = [p.name for p in (tmp_path / "run" / "checkpoints").glob("diverged-*")]
    assert aside == ([f"diverged-{first - 1}"] if (first - 1) % 2 == 0 and saved else [])


@pytest.mark.slow
def test_weights_that_give_no_finite_loss_are_not_gone_back_to(tmp_path, monkeypatch):
    """The newest checkpoint was saved just before the streak: it is set aside, and the one before it counts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = run_config(tmp_path / "run", steps=30, checkpoint={"every": 1}, train={"max_skipped": 3})
    real = loop.make_train_step

    def ruined(*arguments):
        step = real(*arguments)

        def call(state, batch, capacity):
            state, metrics = step(state, batch, capacity)
            if int(state["step"]) == 5:
                state["params"] = jax.tree.map(lambda x: x * np.float32(np.nan), state["params"])
            return state, metrics

        return call

    monkeypatch.setattr(loop, "make_train_step", ruined)
    with pytest.raises(Diverged, match=r"step 8: .* 3 batches in a row .* the checkpoint of step 4 is intact"):
        train(config)
    assert list_steps(tmp_path / "run" / "checkpoints") == [4]
    assert (tmp_path / "run" / "checkpoints" / "diverged-5").is_dir()
    monkeypatch.setattr(loop, "make_train_step", real)
    assert train(config).step == 30


@pytest.mark.slow
def test_resume_keeps_the_count(poisoned, tmp_path):
    train(poisoned)
    whole = records(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "24")
    assert list_steps(tmp_path / "run" / "checkpoints") == [20]  # not of 22, after a batch that was left out
    train(poisoned)
    again = records(tmp_path / "run")
    assert again[0] == whole[0]
    losses = [{r["step"]: r["loss"] for r in logged} for _, logged in (whole, again)]
    assert losses[0].items() <= losses[1].items()
    assert again[1][-1]["skipped"] == len(again[0])
