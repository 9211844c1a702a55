"""Training an H-Net: meshes, capacities, the whole state through a checkpoint, published weights, the report."""

import dataclasses
import itertools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import bytelm
from bytelm.checkpoint import find_checkpoint, list_steps, restore_params
from bytelm.cli import run as cli
from bytelm.config import CapacityConfig, ConfigError, SSMConfig
from bytelm.data.pipeline import Batches, load_text
from bytelm.data.readers import DataError
from bytelm.metrics import read_metrics
from bytelm.models.build import byte_ids, structure
from bytelm.models.hnet_recipe import lr_multipliers
from bytelm.parallel.mesh import make_mesh
from bytelm.parallel.rules import path_string
from bytelm.train import step as step_module
from bytelm.train.loop import train
from bytelm.train.losses import token_nll
from bytelm.train.optim import decay_mask, lr_factors
from bytelm.train.state import init_state, plan_state
from bytelm.train.step import make_train_step, place_batch
from tiny import hnet, run_config


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# 4 slots a step of size: at 32 bytes a row the sizes are 32, 20, 16, 12, 8, 4
CAPACITY = CapacityConfig(start=(1.0,), every=2, margin=1.2, multiple=4)


SHARED = re.compile(r" (collective-permute|all-gather|all-reduce|all-to-all|reduce-scatter)\(.* channel_id=1,")


def hnet_run(run_dir, levels=1, capacity=CAPACITY, model=None, **sections):
    config = dataclasses.replace(
        run_config(run_dir, **sections), model=model or hnet(levels, capacity=capacity, embed_std=0.1)
    )
    return config


def losses(run_dir):
    return {r["step"]: r["loss"] for r in read_metrics(run_dir / "metrics.jsonl") if "loss" in r}


def steps_on(mesh_sizes, devices, capacity=(20, 12), repeats=1):
    """Losses and chunks of five steps, each time from the same beginning; the last state; the program."""
    config = hnet_run("unused", levels=2, mesh=mesh_sizes)
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    sources, _ = load_text(config.data)
    batches = list(itertools.islice(Batches(sources, config.data, byte_ids(config.model), seed=0), 5))
    with jax.set_mesh(mesh):
        setup = plan_state(config, mesh)
        start = init_state(config, setup)
        step = make_train_step(config, setup)
        runs = []
        for _ in range(repeats):
            state, out = jax.tree.map(jnp.copy, start), []
            for batch in batches:
                state, metrics = step(state, place_batch(batch, mesh), capacity)
                out.append([float(metrics[name]) for name in ("nll", "level0/fraction", "level1/bytes_per_chunk")])
            runs.append(out)
        program = step.lower(start, place_batch(batches[0], mesh), capacity).compile().as_text()
    return np.array(runs), state, program


@pytest.fixture(scope="module")
def on_one_device():
    return steps_on({"data": 1}, 1)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp,sequence,tensor", [(2, 1, 4), (4, 1, 2), (1, 4, 2)])
def test_meshes_equal_one_device(on_one_device, fsdp, sequence, tensor):
    """Every time: XLA on a CPU does not keep collectives within loops in order."""
    (want,), state, _ = on_one_device
    got, sharded, program = steps_on({"data": 1, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}, 8, repeats=4)
    loops, main = program.split("\nENTRY ")
    assert bool(SHARED.search(main)) >= (sequence > 1) and not SHARED.search(loops)
    np.testing.assert_array_equal(got, got[:1].repeat(4, axis=0))
    np.testing.assert_allclose(got[0, :, 0], want[:, 0], atol=1e-5)
    np.testing.assert_allclose(got[0, :, 1:], want[:, 1:], rtol=1e-5)
    np.testing.assert_allclose(sharded["chunks"]["need"], state["chunks"]["need"], rtol=1e-6)
    router = sharded["params"]["backbone"]["inner"]["router"]["q"]["kernel"]
    assert router.addressable_shards[0].data.size * fsdp * sequence == router.size


@pytest.mark.slow
def test_one_compilation_for_each_capacity(tmp_path, monkeypatch):
    """A run that changes its slots traces the step once for each capacity it used, and says so in its output."""
    traces = []
    real = step_module.cast_matrices
    monkeypatch.setattr(step_module, "cast_matrices", lambda *a: (traces.append(1), real(*a))[1])
    used = []
    make = step_module.make_train_step

    def recording(config, setup):
        step = make(config, setup)

        def call(state, batch, capacity):
            used.append(capacity)
            return step(state, batch, capacity)

        return call

    monkeypatch.setattr("bytelm.train.loop.make_train_step", recording)
    train(hnet_run(tmp_path / "run", steps=8, eval={"every": 0, "max_bytes": 64, "final_max_bytes": 64}))
    assert len(used) == 8 and used[0] == (32,) and len(set(used)) >= 2
    assert used == sorted(used, reverse=True) or len(set(used)) <= 4
    assert len(traces) == len(set(used)) + 1  # and once for the evaluation step


@pytest.mark.slow
def test_resume_is_bit_identical_with_chunk_statistics(tmp_path):
    config = hnet_run(tmp_path / "whole", steps=7)
    train(config)
    part = dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=str(tmp_path / "part")))
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for step in list_steps(tmp_path / "part/checkpoints")[1:]:
        shutil.rmtree(tmp_path / "part/checkpoints" / str(step))
    (first,) = list_steps(tmp_path / "part/checkpoints")
    assert first < 7
    train(part)
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    saved = []
    for run in ("whole", "part"):
        with ocp.PyTreeCheckpointer() as reader:
            saved.append(reader.restore((find_checkpoint(tmp_path / run) / "rest").resolve())["chunks"])
    np.testing.assert_array_equal(saved[0]["need"], saved[1]["need"])
    np.testing.assert_array_equal(saved[0]["capacity"], saved[1]["capacity"])
    assert saved[0]["need"][0] > 0 and saved[0]["capacity"][0] < 32
    params = [restore_params(find_checkpoint(tmp_path / r), structure(config.model)[1]) for r in ("whole", "part")]
    jax.tree.map(np.testing.assert_array_equal, *[jax.tree.map(np.asarray, p) for p in params])


@pytest.mark.slow
def test_run_writes_chunk_metrics_and_report(tmp_path, capsys):
    config = hnet_run(tmp_path / "run", levels=2, steps=4, eval={"every": 2})
    train(config)
    last = [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in r][-1]
    for level in (0, 1):
        for name in ("bytes_per_chunk", "fraction", "mean_probability", "ratio_loss", "dropped", "need", "used",
                     "at_space", "inside_character", "length_p50", "length_p99"):  # fmt: skip
            assert np.isfinite(last[f"level{level}/{name}"]), name
    assert last["level1/bytes_per_chunk"] >= last["level0/bytes_per_chunk"] >= 1
    assert "bytes/chunk" in capsys.readouterr().err
    shots = [json.loads(line) for line in (tmp_path / "run/chunks.jsonl").read_text().splitlines()]
    assert [s["step"] for s in shots] == [2, 4] and len(shots[0]["levels"]) == 2
    page = (tmp_path / "run/report.html").read_text()
    assert "step 2" in page and "step 4" in page and "data:image/png" in page
    lm = bytelm.load(tmp_path / "run")
    watched = bytes.fromhex(shots[-1]["text"])
    for level, (offset, _, cut) in zip(lm.boundaries(watched), shots[-1]["levels"]):
        np.testing.assert_array_equal(level.offset, offset)
        np.testing.assert_array_equal(level.cut, cut)


@pytest.mark.slow
def test_accumulation_averages_the_losses(tmp_path):
    """Microbatches: each has its own F and G; what a step needs is the largest of theirs."""
    config = hnet_run("unused", train={"grad_accum": 2}, mesh={"data": 1})
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    sources, _ = load_text(config.data)
    batch = next(Batches(sources, config.data, byte_ids(config.model), seed=0))
    halves = [{k: v[i::2] for k, v in batch.items()} for i in range(2)]
    with jax.set_mesh(mesh):
        setup = plan_state(config, mesh)
        _, metrics = make_train_step(config, setup)(init_state(config, setup), place_batch(batch, mesh), (20,))
        single = dataclasses.replace(config, train=dataclasses.replace(config.train, grad_accum=1))
        step = make_train_step(single, setup)
        parts = [step(init_state(config, setup), place_batch(half, mesh), (20,)) for half in halves]
    for name in ("level0/ratio_loss", "level0/fraction", "nll"):
        assert float(metrics[name]) == pytest.approx(np.mean([float(m[name]) for _, m in parts]), rel=1e-5)
    assert float(metrics["level0/dropped"]) == sum(float(m["level0/dropped"]) for _, m in parts)


@pytest.mark.slow
def test_fine_tuning_from_a_published_checkpoint(root, tmp_path):
    """train.init_from takes the reference's files, and the first loss is that of those weights."""
    source = tmp_path / "published"
    source.mkdir()
    shutil.copy(root / "tests/golden/hnet_batch3_ragged/weights.safetensors", source / "model.safetensors")
    shutil.copy(root / "tests/golden/hnet_batch3_ragged/config.json", source / "config.json")
    converted = tmp_path / "converted"
    assert cli(["convert", str(source), str(converted)]) == 0
    model = dataclasses.replace(bytelm.load(source).config, capacity=CapacityConfig(start=(1.0,), every=0, multiple=4))
    first = {}
    for name in ("published", "converted"):
        run = tmp_path / f"run_{name}"
        train(hnet_run(run, model=model, steps=2, train={"init_from": str(tmp_path / name)}))
        first[name] = losses(run)
    assert first["published"] == first["converted"]
    scratch = tmp_path / "scratch"
    train(hnet_run(scratch, model=model, steps=1))
    assert losses(scratch)[1] != first["published"][1]
    config = hnet_run(tmp_path / "run_published", model=model)
    sources, _ = load_text(config.data)
    batch = {k: jnp.asarray(v) for k, v in next(Batches(sources, config.data, byte_ids(model), seed=0)).items()}
    lm = bytelm.load(source)

    out = nnx.merge(lm.graph, lm.params)(batch["inputs"], batch["segments"])
    mean = float(token_nll(out.logits, batch["targets"])[batch["segments"] > 0].mean())
    assert first["published"][1] == pytest.approx(mean, abs=1e-4)
    other = dataclasses.replace(model, ssm=SSMConfig(d_state=8, head_dim=64))
    with pytest.raises(ConfigError, match="do not fit this model"):
        train(hnet_run(tmp_path / "no", model=other, train={"init_from": str(source)}))


@pytest.mark.slow
def test_reserved_bytes_in_the_text(tmp_path):
    text = tmp_path / "t.txt"
    text.write_bytes(b"plain text " * 300 + b"\xff\xfe" + b" more text" * 300)
    data = {"train": (str(text),), "valid": (str(text),)}
    with pytest.raises(DataError, match=r"t\.txt\[\d+:\d+\]: .*byte 0xF[EF] at offset"):
        train(hnet_run(tmp_path / "a", steps=20, data=data))
    result = train(hnet_run(tmp_path / "b", steps=2, data=data | {"reserved": "replace"}))
    assert result.heldout.bytes == 512  # of the original text
    with pytest.raises(ConfigError, match="best_fit"):
        train(hnet_run(tmp_path / "c", data=data | {"reserved": "replace", "packing": "best_fit"}))


@pytest.mark.slow
def test_overfits_one_batch(tmp_path):
    """Loss goes far down on one repeated row, and the ratio loss pulls the boundaries towards the target."""
    text = tmp_path / "t.txt"
    text.write_bytes(b"the cat sat on the mat; ")
    data = {"train": (str(text),), "valid": (str(text),), "seq_len": 25, "shuffle": False}
    model = hnet(1, embed_std=0.1, init_std=0.0, targets=(4.0,), capacity=CapacityConfig(start=(1.0,), every=0))
    config = hnet_run(tmp_path / "run", model=model, steps=60, data=data, optim={"lr": 5e-3, "warmup_steps": 5})
    train(config)
    records = [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in r]
    assert records[-1]["loss"] < 0.3 < records[0]["loss"] and records[-1]["level0/ratio_loss"] < 1.3


@pytest.mark.parametrize("decay", ["patterns", "hnet_reference"])
def test_decay_and_stage_rates_in_the_optimizer(decay):
    config = hnet_run("x", levels=2, optim={"decay": decay, "lr_multipliers": (("head", 7.0),)})
    params = structure(config.model)[1]
    named = lambda tree: {path_string(p): v for p, v in jax.tree.leaves_with_path(tree)}  # noqa: E731
    mask, factors = named(decay_mask(config.optim, params)), named(lr_factors(config.optim, params, config.model))
    norm = "backbone/inner/encoder/run0/mixer_norm/scale"
    assert mask["backbone/encoder/run0/mamba/x/kernel"] and not mask["backbone/residual/bias"]
    assert mask[norm] == mask["embed/table"] == mask["backbone/inner/inner/pad"] == (decay == "hnet_reference")
    outer, middle, inner = lr_multipliers(config.model)
    assert factors["head/kernel"] == 7.0 and factors["embed/table"] == outer and factors[norm] == middle
    assert factors["backbone/inner/inner/main/norm/scale"] == inner == factors["backbone/inner/inner/pad"]
