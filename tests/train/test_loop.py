"""Whole runs in this process (8 fake devices): what is written, resumed, refused, noticed."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest

import bytelm
from bytelm import codec
from bytelm.checkpoint import Checkpoints, find_checkpoint, list_steps, read_meta, restore_params
from bytelm.config import CheckpointConfig, ConfigError, MeshConfig, SSMConfig, StackConfig
from bytelm.data.pipeline import load_text
from bytelm.metrics import read_metrics
from bytelm.models.build import structure
from bytelm.parallel.mesh import make_mesh
from bytelm.train import evaluation, loop
from bytelm.train.loop import Diverged, train
from bytelm.train.state import init_state, plan_state
from tiny import run_config


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def losses(run_dir):
    return {r["step"]: r["loss"] for r in read_metrics(run_dir / "metrics.jsonl") if "loss" in r}


def test_a_run_writes_what_it_says(tmp_path):
    config = run_config(tmp_path / "run", eval={"every": 2}, checkpoint={"keep": 2, "keep_every": 3, "every": 1})
    result = bytelm.train(config)
    run = tmp_path / "run"
    assert result.step == 6 and result.heldout.bytes == 512 and result.run_dir == run
    assert list_steps(run / "checkpoints") == [3, 5, 6]
    assert codec.load(run / "config.yaml") == config
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    records = read_metrics(run / "metrics.jsonl")
    start = records[0]
    assert start["seed"] == 0 and start["versions"]["jax"] == jax.__version__ and start["devices"] == 8
    assert start["train_flops_per_byte"] > 0 and start["matmul_flops_per_second"] > 0 and "commit" in start
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6]
    held = {r["step"]: r["heldout_bpb"] for r in records if "heldout_bpb" in r}
    assert sorted(held) == [2, 4, 6] and held[6] < held[2]
    last = next(r for r in records if r.get("step") == 6 and "loss" in r)
    assert 0 < last["utilization_measured"] < 5 and last["bytes_per_second"] > 0
    assert last["bytes"] == 6 * 8 * 32  # one long document without an end symbol: every position is a byte
    meta = read_meta(run / "checkpoints" / "6")
    assert meta["config"] == codec.to_dict(config) and meta["step"] == 6 and meta["versions"]
    assert list_steps(run / "best") == [6] and read_meta(run / "best" / "6")["best_bpb"] == pytest.approx(held[6])

    lm = bytelm.load(run)
    assert lm.score(b"ROMEO").total < 0 and lm.window == 32
    text = load_text(config.data)[1].read(0)
    nats = -sum(s.total for s in lm.score_batch([text[:512]]))
    assert nats / math.log(2) / 512 == pytest.approx(held[6], abs=1e-5)  # the trainer and the ByteLM agree


def test_resume_is_bit_identical(tmp_path):
    """Gone on with from step 6 of 8, against one go: same losses and weights to the last bit."""
    whole = run_config(tmp_path / "whole", steps=8)
    train(whole)
    part = run_config(tmp_path / "part", steps=8)
    # The schedule must be that of the whole run, so the run is cut by taking the later checkpoints away.
    train(part)
    for step in (6, 8):
        shutil.rmtree(tmp_path / "part" / "checkpoints" / str(step), ignore_errors=True)
    assert list_steps(tmp_path / "part" / "checkpoints") == []
    train(part)  # nothing left to resume: from scratch again
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "8")
    train(part)
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    final = [restore_params(find_checkpoint(tmp_path / d), structure(whole.model)[1]) for d in ("whole", "part")]
    jax.tree.map(np.testing.assert_array_equal, *[jax.tree.map(np.asarray, p) for p in final])


@pytest.mark.slow
def test_finished_run_is_left_alone(tmp_path, capsys):
    config = run_config(tmp_path / "run", steps=2)
    train(config)
    before = (tmp_path / "run" / "checkpoints" / "2" / "meta" / "metadata").stat().st_mtime_ns
    result = train(config)
    assert result.step == 2 and "resuming" in capsys.readouterr().err
    held = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "heldout_bpb" in r]
    assert len(held) == 1
    assert (tmp_path / "run" / "checkpoints" / "2" / "meta" / "metadata").stat().st_mtime_ns == before


@pytest.mark.slow
def test_changed_settings_are_refused_by_name(tmp_path, capsys):
    config = run_config(tmp_path / "run", steps=2)
    train(config)
    changed = run_config(tmp_path / "run", steps=2, optim={"lr": 0.5}, data={"seq_len": 16})
    with pytest.raises(
        ConfigError, match=r"(?s)data\.seq_len: 32 -> 16.*optim\.lr: 0\.003 -> 0\.5.*--train\.allow-config-change"
    ):
        train(changed)
    train(run_config(tmp_path / "run", steps=4, checkpoint={"keep": 1}))  # longer, and other upkeep: allowed, and said
    assert "train.steps: 2 -> 4" in capsys.readouterr().err
    train(run_config(tmp_path / "run", steps=5, optim={"lr": 0.5}, train={"allow_config_change": True}))
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4, 5]


def _break(step_folder):
    """Cuts every array file of a checkpoint in half, as a disk that filled up would."""
    cut = 0
    for file in (step_folder / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 200:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            cut += 1
    assert cut


@pytest.mark.slow
def test_broken_newest_checkpoint_falls_back(tmp_path, capsys):
    config = run_config(tmp_path / "run", steps=6)
    train(config)
    want = losses(tmp_path / "run")
    _break(tmp_path / "run" / "checkpoints" / "6")
    train(config)
    said = capsys.readouterr().err
    assert "checkpoints/6 cannot be read" in said and "moved to broken-6" in said and "at step 4" in said
    assert losses(tmp_path / "run") == want
    assert list_steps(tmp_path / "run" / "checkpoints") == [4, 6]
    bytelm.load(tmp_path / "run")


def test_all_checkpoints_broken_is_an_error_not_a_new_start(tmp_path):
    config = run_config(tmp_path / "run", steps=4)
    train(config)
    for step in (2, 4):
        _break(tmp_path / "run" / "checkpoints" / str(step))
    with pytest.raises(ValueError, match="none of its checkpoints can be read"):
        train(config)


def test_half_written_checkpoint_is_ignored(tmp_path):
    """A save cut off by a kill leaves a temporary folder, never a step that looks whole."""
    config = run_config(tmp_path / "run", steps=4)
    train(config)
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "4", folder / "9.orbax-checkpoint-tmp")
    assert list_steps(folder) == [2, 4]
    assert train(config).step == 4


@pytest.mark.slow
def test_load_of_a_broken_checkpoint_is_a_clear_error(tmp_path):
    config = run_config(tmp_path / "run", steps=2)
    train(config)
    _break(tmp_path / "run" / "checkpoints" / "2")
    with pytest.raises(ValueError, match="checkpoints/2: the weights cannot be read"):
        bytelm.load(tmp_path / "run")
    with pytest.raises(ValueError, match="no checkpoint '7'; there is: 2, best"):
        bytelm.load(tmp_path / "run", checkpoint="7")


@pytest.mark.slow
def test_divergence_stops_with_the_last_good_checkpoint(tmp_path):
    config = run_config(tmp_path / "run", steps=40, optim={"lr": 1e30, "schedule": "constant", "clip_norm": 0.0})
    with pytest.raises(Diverged, match=r"training has diverged; (the checkpoint of step \d+ is intact|no checkpoint)"):
        train(config)
    for step in list_steps(tmp_path / "run" / "checkpoints"):
        params = restore_params(tmp_path / "run" / "checkpoints" / str(step), structure(config.model)[1])
        assert all(np.isfinite(np.asarray(p)).all() for p in jax.tree.leaves(params))


@pytest.mark.slow
def test_init_from_a_run_and_from_weights(tmp_path):
    first = run_config(tmp_path / "first", steps=3)
    train(first)
    from bytelm.cli import run as cli

    assert cli(["convert", str(tmp_path / "first"), str(tmp_path / "weights")]) == 0
    starts = {}
    for name in ("first", "weights"):
        config = run_config(tmp_path / f"from_{name}", steps=1, train={"init_from": str(tmp_path / name)})
        train(config)
        starts[name] = losses(tmp_path / f"from_{name}")[1]
    assert starts["first"] == starts["weights"] < losses(tmp_path / "first")[1] - 0.01
    other = dataclasses.replace(first.model, stack=dataclasses.replace(first.model.stack, d_mlp=32))
    config = dataclasses.replace(run_config(tmp_path / "x", train={"init_from": str(tmp_path / "first")}), model=other)
    with pytest.raises(ConfigError, match=r"do not fit this model .*mlp/down/kernel: \(1, 64, 32\) / \(1, 32, 32\)"):
        train(config)
    with pytest.raises(ConfigError, match="train.init_from=nowhere"):
        train(run_config(tmp_path / "y", train={"init_from": "nowhere"}))


def test_checkpoint_moves_between_meshes(tmp_path):
    """Saved on 2 x 4, read on 4 x 2 and on one device: the same numbers, laid out for the new mesh."""
    saved = None
    for i, (sizes, devices) in enumerate([((1, 2, 4), 8), ((1, 4, 2), 8), ((1, 1, 1), 1)]):
        config = run_config(tmp_path, mesh=dict(zip(("data", "fsdp", "tensor"), sizes)))
        mesh = make_mesh(config.mesh, jax.devices()[:devices])
        with jax.set_mesh(mesh):
            setup = plan_state(config, mesh)
            checkpoints = Checkpoints(tmp_path / "run", CheckpointConfig())
            if i == 0:
                state = init_state(config, setup)
                checkpoints.save(1, state, {"streams": []}, {"x": 1}, wait=True)
                saved = jax.tree.map(np.asarray, state)
            else:
                state, data, meta = checkpoints.restore(setup.abstract)
                assert data == {"streams": []} and meta == {"x": 1}
                jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), state, saved)
                jax.tree.map(lambda a, s: a.sharding == s or pytest.fail(f"{a.sharding} {s}"), state, setup.shardings)
            checkpoints.close()


@pytest.mark.slow
def test_training_goes_on_on_another_mesh(tmp_path):
    config = run_config(tmp_path / "run", steps=2, mesh={"data": 1, "fsdp": 2, "tensor": 4})
    train(config)
    result = train(run_config(tmp_path / "run", steps=4, mesh={"data": 2, "fsdp": 4}))
    assert result.step == 4 and sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]


def test_step_compiles_once(tmp_path, monkeypatch):
    """Six steps with two evaluations: one trace of the train step, one of the evaluation."""
    traces = []
    for module, name in ((loop, "make_train_step"), (evaluation, "make_eval_step")):
        real = getattr(module, name)

        def counting(*args, real=real, name=name):
            f = real(*args)

            def call(*a):
                out = f(*a)
                traces.append((name, f._cache_size()))
                return out

            return call

        monkeypatch.setattr(module, name, counting)
    train(run_config(tmp_path / "run", eval={"every": 3}))
    assert {count for _, count in traces} == {1} and {name for name, _ in traces} == {
        "make_train_step",
        "make_eval_step",
    }


def test_overfits_one_batch(tmp_path):
    """On 256 bytes of text the loss falls near zero: every part of the step works together."""
    (tmp_path / "t.txt").write_bytes(bytes(np.random.default_rng(0).integers(0, 256, 255, dtype=np.uint8)))
    config = run_config(
        tmp_path / "run", steps=120, data={"train": (str(tmp_path / "t.txt"),), "valid": (str(tmp_path / "t.txt"),)},
        optim={"lr": 1e-2, "weight_decay": 0.0}, train={"log_every": 120}, checkpoint={"every": 1000},
    )  # fmt: skip
    train(config)
    assert losses(tmp_path / "run")[1] > 5 and losses(tmp_path / "run")[120] < 0.3


@pytest.mark.slow
def test_profiler_window_and_tensorboard(tmp_path):
    train(run_config(tmp_path / "run", train={"profile_start": 2, "profile_steps": 2, "tensorboard": True}))
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.slow
def test_profiler_window_across_a_resume(tmp_path):
    """A run that ends, and one that begins, inside the window."""
    profiler = {"profile_start": 1, "profile_steps": 4}
    train(run_config(tmp_path / "run", steps=2, train=profiler))
    first = list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    train(run_config(tmp_path / "run", steps=8, train=profiler))
    assert first and len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) > len(first)


def test_other_packing_does_not_fit_a_saved_position(tmp_path):
    train(run_config(tmp_path / "run", steps=2))
    changed = run_config(tmp_path / "run", steps=3, data={"packing": "best_fit"}, train={"allow_config_change": True})
    with pytest.raises(ConfigError, match="data position does not fit"):
        train(changed)


@pytest.mark.slow
def test_broken_meta_falls_back(tmp_path, capsys):
    config = run_config(tmp_path / "run", steps=4)
    train(config)
    for content in ("[]", "{", ""):
        (tmp_path / "run" / "checkpoints" / "4" / "meta" / "metadata").write_text(content)
        with pytest.raises(ValueError, match="not a readable bytelm checkpoint"):
            bytelm.load(tmp_path / "run")
        assert train(config).step == 4
    assert "at step 2" in capsys.readouterr().err


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    config = run_config(tmp_path / "run", steps=2)
    train(config)
    record = tmp_path / "run" / "checkpoints" / "2" / "meta" / "metadata"
    record.write_text(record.read_text().replace("bytelm-checkpoint-2", "bytelm-checkpoint-1"))
    with pytest.raises(ConfigError, match="saved by another version of bytelm .*--train.init-from"):
        train(config)


@pytest.mark.slow
def test_best_is_replaced_when_the_run_goes_another_way(tmp_path):
    """best/ of steps that a fall-back undid goes away, and the same step can be saved as best again."""
    config = run_config(tmp_path / "run", steps=4, eval={"every": 1}, optim={"schedule": "constant"})
    train(config)
    assert list_steps(tmp_path / "run" / "best") == [4]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    train(config)
    assert list_steps(tmp_path / "run" / "best") == [4]


def test_nan_is_never_the_best(tmp_path):
    config = run_config(tmp_path / "run", steps=9, optim={"lr": 1e30, "clip_norm": 0.0}, eval={"every": 2},
                        train={"log_every": 100, "max_skipped": 4}, checkpoint={"every": 100})  # fmt: skip
    with pytest.raises(Diverged, match=r"step 5: loss nan, .*, 4 batches in a row .*bundled:shakespeare\[\d+:\d+\]"):
        train(config)
    assert list_steps(tmp_path / "run" / "best") == []


def test_a_file_that_shrinks_while_training_saves_first(tmp_path, monkeypatch):
    text = tmp_path / "t.txt"
    text.write_bytes(bytes(range(256)) * 400)
    config = run_config(
        tmp_path / "run", steps=400, data={"train": (str(text),), "valid": ()}, checkpoint={"every": 1000}
    )
    real = loop.place_batch

    def shrink(batch, *where):
        if batch["inputs"].shape[0] == 8 and text.stat().st_size > 1000:
            text.write_bytes(b"x")
        return real(batch, *where)

    monkeypatch.setattr(loop, "place_batch", shrink)
    with pytest.raises(ValueError, match="shorter than when the run began"):
        train(config)
    (saved,) = list_steps(tmp_path / "run" / "checkpoints")
    assert 1 <= saved < 400


def test_missing_wandb_names_the_extra(tmp_path):
    pytest.importorskip("tensorboardX")
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"pip install 'bytelm\[wandb\]'"):
            train(run_config(tmp_path / "run", train={"wandb_project": "x"}))


def test_no_heldout_text(tmp_path):
    config = run_config(tmp_path / "run", steps=2, data={"valid": (), "valid_fraction": 0.0})
    assert train(config).heldout is None


def test_unwritable_run_dir(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="train.run_dir=.*cannot be written"):
        train(run_config(tmp_path / "file"))


def test_two_runs_in_one_folder(tmp_path):
    with loop._own(tmp_path / "run"), pytest.raises(ConfigError, match="another process is training there"):
        train(run_config(tmp_path / "run"))


def test_batch_that_the_mesh_cannot_split_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"data\.batch_size=4 cannot be split over data x fsdp = 8 devices: make it a multiple of 8"
    ):
        train(run_config(tmp_path / "run", data={"batch_size": 4}))


@pytest.mark.slow
def test_mamba_only_and_full_attention_run(tmp_path):
    for layout in ("m1", "T1"):
        stack = StackConfig(layout=layout, d_model=16, num_heads=2, d_mlp=16, ssm=SSMConfig(head_dim=8))
        config = run_config(tmp_path / layout, steps=2, mesh=dataclasses.asdict(MeshConfig()))
        result = train(dataclasses.replace(config, model=dataclasses.replace(config.model, stack=stack)))
        assert json.dumps(result.heldout.bpb) != "NaN"
