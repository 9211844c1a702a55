"""Training an encoder-decoder: meshes, the controller in the state, resume, starting from a ByT5."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm.checkpoint import find_checkpoint, restore_params
from bytelm.config import Config, ConfigError, DataConfig, DeletionConfig
from bytelm.data.pipeline import Batches, load_text
from bytelm.interop.published import save_hf
from bytelm.metrics import read_metrics
from bytelm.models.build import byte_ids, structure
from bytelm.models.deletion import first_control, next_control
from bytelm.parallel.mesh import make_mesh
from bytelm.parallel.rules import path_string
from bytelm.train import step as step_module
from bytelm.train.loop import train
from bytelm.train.state import init_state, plan_state
from bytelm.train.step import make_train_step, place_batch
from tiny import LONG, network, run_config, t5

# Fast gains, so that a run of a few steps moves alpha.
GATE = {"rate": 0.6, "k_p": 2.0, "k_i": 0.01, "delay": 1}


def t5_run(run_dir, *, steps=6, deletion=GATE, kind="learned", dropout=0.1, **sections) -> Config:
    text = {"train": ("bundled:shakespeare[:20000]",), "valid": ("bundled:shakespeare[1003854:1006000]",)}
    data = DataConfig(task="spans", seq_len=32, batch_size=8, mean_span=5.0, **text)
    base = dataclasses.replace(
        run_config(run_dir, steps=steps, optim={"schedule": "constant"}),
        model=t5(kind, deletion=deletion, dropout=dropout),
        data=data,
    )
    return dataclasses.replace(
        base, **{name: dataclasses.replace(getattr(base, name), **fields) for name, fields in sections.items()}
    )


def losses(run_dir):
    return {r["step"]: r["loss"] for r in read_metrics(run_dir / "metrics.jsonl") if "loss" in r}


def steps_on(mesh_sizes, devices, steps=5, **sections):
    config = t5_run("unused", mesh=mesh_sizes, dropout=0.0, **sections)
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    sources, _ = load_text(config.data)
    batches = Batches(sources, config.data, byte_ids(config.model), seed=0)
    with jax.set_mesh(mesh):
        setup = plan_state(config, mesh)
        state, step, out = init_state(config, setup), make_train_step(config, setup), []
        for _ in range(steps):
            state, metrics = step(state, place_batch(next(batches), mesh))
            out.append([float(metrics[name]) for name in ("nll", "deletion/rate", "deletion/alpha")])
    return np.array(out), state


@pytest.mark.slow
def test_meshes_and_microbatches_change_nothing():
    alone, _ = steps_on({"data": 1}, 1)
    split, state = steps_on({"data": 1, "fsdp": 2, "tensor": 4}, 8)
    np.testing.assert_allclose(split, alone, atol=1e-5)
    kernel = state["params"]["encoder"]["blocks"]["attention"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    micro, _ = steps_on({"data": 1}, 1, train={"grad_accum": 2})
    np.testing.assert_allclose(micro[0, 0], alone[0, 0], atol=1e-5)  # before alpha moves: means of means differ after


def test_heads_that_the_mesh_does_not_divide_stay_whole():
    config = t5_run("unused", mesh={"data": 1, "fsdp": 2, "tensor": 4})
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_heads=6))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        params = plan_state(config, mesh).abstract["params"]
    blocks = params["decoder"]["blocks"]
    assert blocks["attention"]["q"]["kernel"].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", None, None)
    assert blocks["mlp"]["up"]["kernel"].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")


@pytest.mark.slow
def test_a_run_logs_saves_and_goes_on_bit_for_bit(tmp_path):
    result = train(t5_run(tmp_path / "a"))
    records = read_metrics(tmp_path / "a/metrics.jsonl")
    held = [r for r in records if "heldout_bpb" in r]
    assert held[-1]["heldout_soft_bpb"] != held[-1]["heldout_bpb"] == result.heldout.bpb
    assert 0 <= held[-1]["heldout_deleted"] <= 1
    logged = [r for r in records if "deletion/alpha" in r]
    assert logged[0]["deletion/alpha"] == logged[1]["deletion/alpha"] == 0  # the delay, and the step of lag
    assert logged[-1]["deletion/alpha"] > 0
    config = t5_run("unused").model.deletion
    state = first_control(config)
    for i, record in enumerate(logged):  # what the log says is what the controller did
        assert record["deletion/alpha"] == pytest.approx(float(state["alpha"]), rel=1e-5, abs=1e-9)
        state = next_control(config, state, jnp.float32(record["deletion/rate"]), jnp.int32(i))
    train(t5_run(tmp_path / "b", steps=6, train={"steps": 4}))
    train(t5_run(tmp_path / "b"))
    assert losses(tmp_path / "a")[6] == losses(tmp_path / "b")[6]
    graph = structure(t5_run("unused").model)[1]
    ends = [restore_params(find_checkpoint(tmp_path / run), graph) for run in "ab"]
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.parametrize(
    "kind",
    [
        "none",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("boundary", "random", "convolution")),
        pytest.param("fixed", marks=LONG),
    ],
)
def test_every_kind_trains_in_one_compilation(tmp_path, kind, monkeypatch):
    compiled = []
    merge = step_module.nnx.merge
    monkeypatch.setattr(step_module.nnx, "merge", lambda *a: compiled.append(1) or merge(*a))
    result = train(t5_run(tmp_path / "run", kind=kind, deletion={"rate": 0.5}, steps=3))
    assert np.isfinite(result.heldout.bpb)
    assert len(compiled) == (3 if kind in ("random", "fixed") else 2)  # the step, and each way to evaluate


@pytest.mark.slow
def test_slots_follow_what_is_kept(tmp_path):
    """All of the row at first, fewer once rows have shown what they keep; equal losses, on a resumed run too."""
    fixed = {"rate": 0.5, "train": "compact", "capacity_every": 2}
    one = lambda name, steps=6, **more: train(  # noqa: E731
        t5_run(tmp_path / name, kind="fixed", deletion=fixed | more, dropout=0.0, steps=6, train={"steps": steps})
    )
    one("masked", train="masked_hard", capacity_every=0)
    one("compact")
    one("cut", steps=4)
    one("cut")
    records = [r for r in read_metrics(tmp_path / "compact/metrics.jsonl") if "deletion/used" in r]
    used = [r["deletion/used"] for r in records]
    assert all(r["deletion/overflow"] == 0 for r in records)
    assert max(used[:2]) < 0.7 < min(used[2:])
    whole, cut = losses(tmp_path / "compact"), losses(tmp_path / "cut")
    assert whole == cut
    for step, loss in losses(tmp_path / "masked").items():
        assert whole[step] == pytest.approx(loss, abs=2e-5)
    for name in ("masked", "compact"):  # a run may begin to choose slots, or leave off
        other = dict(train="compact", capacity_every=2) if name == "masked" else dict(capacity_every=0)
        train(t5_run(tmp_path / name, kind="fixed", deletion=fixed | other, dropout=0.0, steps=7,
                     train={"steps": 7, "allow_config_change": True}))  # fmt: skip
    ends = [losses(tmp_path / name)[7] for name in ("masked", "compact")]
    assert ends[0] == pytest.approx(ends[1], abs=2e-5)


@pytest.mark.slow
def test_a_byt5_becomes_an_mrt5(tmp_path, capfd):
    plain = dataclasses.replace(t5("none"), deletion=DeletionConfig())
    params = network(plain)[1]
    save_hf(tmp_path / "byt5", dataclasses.replace(plain, softmax_one=False), params)
    config = t5_run(tmp_path / "run", steps=1, optim={"lr": 1e-9}, train={"init_from": str(tmp_path / "byt5")})
    train(config)
    assert "new: encoder/delete_gate/" in capfd.readouterr().err
    got = restore_params(find_checkpoint(tmp_path / "run"), structure(config.model)[1])
    flat = {path_string(p): x for p, x in jax.tree.leaves_with_path(params)}
    for path, x in jax.tree.leaves_with_path(got):
        name = path_string(path)
        if name in flat:
            np.testing.assert_allclose(x, flat[name], atol=1e-6)
    assert float(got["encoder"]["delete_gate"]["bias"]) == pytest.approx(1, abs=1e-6)
    other = dataclasses.replace(config.model, d_mlp=96)
    with pytest.raises(ConfigError, match="do not fit"):
        train(
            dataclasses.replace(
                config, model=other, train=dataclasses.replace(config.train, run_dir=str(tmp_path / "c"))
            )
        )
