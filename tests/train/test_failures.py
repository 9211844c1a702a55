"""Things that go wrong while a run goes on: what is said, and that what was learned is kept."""

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from bytelm import codec
from bytelm.checkpoint import CheckpointError, list_steps, restore_params
from bytelm.metrics import read_metrics
from bytelm.models.build import structure
from bytelm.train.loop import train
from tiny import FULL, flat, run_config


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def losses(run_dir):
    return {r["step"]: r["loss"] for r in read_metrics(run_dir / "metrics.jsonl") if "loss" in r and "event" not in r}


def launch(root, config, path, **popen):
    path.write_text(codec.dumps(config))
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu",
           "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
           "JAX_COMPILATION_CACHE_DIR": os.path.expanduser("~/.cache/bytelm/test-xla")}  # fmt: skip
    return subprocess.Popen([sys.executable, "-m", "bytelm.cli", "train", str(path)], env=env,
                            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **popen)  # fmt: skip


def wait_for_step(process, run_dir, step, seconds=120):
    stop = time.monotonic() + seconds
    while time.monotonic() < stop and process.poll() is None:
        if max(losses(run_dir), default=0) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step}: {process.communicate()}")


def test_out_of_memory_says_what_took_it(tmp_path, root):
    """A real one: attention scores of rows of 256 kB, 2.4 TB at once."""
    config = run_config(tmp_path / "run", steps=2, data={"seq_len": 1 << 18, "batch_size": 8}, eval={"window": 32})
    process = launch(root, dataclasses.replace(config, model=flat(FULL)), tmp_path / "c.yaml")
    said = process.communicate(timeout=200)[1]
    assert process.returncode == 2, said
    assert "out of memory on a device: RESOURCE_EXHAUSTED: Out of memory allocating" in said
    assert "activations" in said and "optimizer" in said and "GiB" in said and "Traceback" not in said
    for advice in ("--train.grad-accum 2", "--data.seq-len", "--model.stack.remat full", "--mesh.fsdp", "bfloat16"):
        assert advice in said


@pytest.mark.slow
def test_full_disk_while_saving_keeps_the_checkpoint_before(tmp_path, root):
    """No file may grow beyond 40 kB, which the larger arrays pass: writing fails half-way, as on a full disk."""
    config = run_config(tmp_path / "run", steps=4, train={"compilation_cache": "off"})
    train(config)
    assert list_steps(tmp_path / "run" / "checkpoints") == [2, 4]
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=8))

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    process = launch(root, longer, tmp_path / "c.yaml", preexec_fn=limit)
    said = process.communicate(timeout=200)[1]
    assert process.returncode == 2 and "the checkpoint could not be written" in said and "Earlier ones stand" in said
    assert list_steps(tmp_path / "run" / "checkpoints") == [2, 4]
    assert train(longer).step == 8  # with room again it goes on
    assert sorted(losses(tmp_path / "run")) == list(range(1, 9))


def test_a_disk_without_room_is_seen_before_writing(tmp_path, monkeypatch):
    config = run_config(tmp_path / "run", steps=4)
    usage = shutil.disk_usage(tmp_path)
    free = iter([10**9, *[100_000] * 9])
    monkeypatch.setattr("bytelm.checkpoint.shutil.disk_usage", lambda _: usage._replace(free=next(free)))
    with pytest.raises(CheckpointError, match=r"could not be written: it takes 0\.00 GB, the disk has 0\.00 GB free"):
        train(config)
    assert list_steps(tmp_path / "run" / "checkpoints") == [2]


@pytest.mark.slow
def test_a_worker_that_dies_saves_first(tmp_path, root):
    config = run_config(tmp_path / "run", steps=5000, data={"workers": 2, "batch_size": 4}, checkpoint={"every": 10000})
    process = launch(root, config, tmp_path / "c.yaml")
    wait_for_step(process, tmp_path / "run", 3)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    workers = [p for p in found if "spawn_main" in Path(f"/proc/{p}/cmdline").read_text()]
    assert len(workers) == 2
    os.kill(int(workers[0]), signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and "the data pipeline failed (data.workers=2)" in said, said
    (saved,) = list_steps(tmp_path / "run" / "checkpoints")
    assert saved >= 3 and "Traceback" not in said.split("bytelm:")[-1]


def damage(folder, rng):
    """One thing wrong with a checkpoint: a file cut, emptied, changed, gone, or in another's place."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    victim = rng.choice(files)
    data, kind = victim.read_bytes(), rng.randrange(5)
    if kind == 0:
        victim.write_bytes(data[: len(data) // 2])
    elif kind == 1:
        victim.write_bytes(b"")
    elif kind == 2:
        victim.unlink()
    elif kind == 3:
        at = rng.randrange(len(data))
        victim.write_bytes(data[:at] + rng.randbytes(min(40, len(data) - at)) + data[at + 40 :])
    else:
        shutil.rmtree(rng.choice([p for p in folder.iterdir() if p.is_dir()]))
    return f"{kind} {victim.relative_to(folder)}"


def _overwrite(path):
    """Every byte another one, the length the same."""
    path.write_bytes(bytes(b ^ 0x5A for b in path.read_bytes()))


def _largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file() and p.parent.name == "d"), key=lambda p: p.stat().st_size)


# Twenty ways to damage what reading needs: {name: (where in the checkpoint, what is done)}
BREAKS = {
    **{f"{item} {how}": (lambda f, item=item: _largest(f / item), change) for item in ("params", "rest")
       for how, change in (("cut", lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2])),
                           ("changed", _overwrite), ("emptied", lambda p: p.write_bytes(b"")), ("gone", Path.unlink))},
    **{f"{item} index {how}": (lambda f, item=item: f / item / "manifest.ocdbt", change) for item in ("params", "rest")
       for how, change in (("changed", _overwrite), ("gone", Path.unlink))},
    **{f"{item} folder gone": (lambda f, item=item: f / item, shutil.rmtree) for item in ("params", "rest")},
    **{f"{item} {how}": (lambda f, item=item: f / item / "metadata", change) for item in ("data", "meta")
       for how, change in (("cut", lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2])),
                           ("a list", lambda p: p.write_text("[1, 2]")), ("gone", Path.unlink))},
}  # fmt: skip


EVERY = "BYTELM_EVERY_DAMAGE" in os.environ  # else a third of them
STEPS = 400 if EVERY else 200  # of the run that is killed


@pytest.mark.slow
def test_twenty_breaks_of_the_newest_checkpoint_all_fall_back(tmp_path):
    """Whatever is broken of it, it is set aside, and the run goes on from the one before, to the same losses."""
    assert len(BREAKS) == 20
    config = run_config(tmp_path / "whole", steps=8, checkpoint={"keep": 4})
    train(config)
    wanted = losses(tmp_path / "whole")
    for name, (where, change) in list(BREAKS.items())[:: 1 if EVERY else 3]:
        run = tmp_path / name
        shutil.copytree(tmp_path / "whole", run)
        shutil.rmtree(run / "checkpoints" / "8")
        change(where(run / "checkpoints" / "6"))
        result = train(dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=str(run))))
        assert (run / "checkpoints" / "broken-6").is_dir(), name
        assert result.step == 8 and losses(run) == wanted, name


@pytest.mark.slow
def test_twenty_damages_to_the_newest_checkpoint(tmp_path):
    """Random damage, also to what reading does not need: the run goes on from it or from the one before, to the same
    losses and weights."""
    config = run_config(tmp_path / "whole", steps=8, checkpoint={"keep": 4})
    train(config)
    wanted, fell_back = losses(tmp_path / "whole"), 0
    shapes = structure(config.model)[1]
    last = restore_params(tmp_path / "whole" / "checkpoints" / "8", shapes)
    for i in range(20 if EVERY else 7):
        run = tmp_path / f"{i}"
        shutil.copytree(tmp_path / "whole", run)
        shutil.rmtree(run / "checkpoints" / "8")
        what = damage(run / "checkpoints" / "6", random.Random(i))
        result = train(dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=str(run))))
        assert result.step == 8 and losses(run) == wanted, what
        again = restore_params(run / "checkpoints" / "8", shapes)
        same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), again, last)
        assert all(jax.tree.leaves(same)), what
        fell_back += (run / "checkpoints" / "broken-6").exists()
    assert fell_back >= (5 if EVERY else 2)  # some damage is to what reading does not need


@pytest.mark.slow
def test_many_kills(tmp_path, root):
    """SIGKILL at 50 (else 12) random moments, saves included (one every second step): as a run that is left alone."""
    rng = random.Random(0)
    config = run_config(tmp_path / "whole", steps=STEPS, data={"batch_size": 2}, checkpoint={"every": 2})
    assert launch(root, config, tmp_path / "whole.yaml").wait(timeout=600) == 0
    wanted, kills = losses(tmp_path / "whole"), 0
    killed = dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=str(tmp_path / "killed")))
    while True:
        process = launch(root, killed, tmp_path / "killed.yaml")
        if kills < (50 if EVERY else 12):
            before = max(losses(tmp_path / "killed"), default=0)
            wait_for_step(process, tmp_path / "killed", min(before + rng.randint(1, 6), STEPS - 1))
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
            kills += process.wait() == -signal.SIGKILL
            continue
        assert process.wait(timeout=600) == 0, process.communicate()
        break
    assert losses(tmp_path / "killed") == wanted and len(wanted) == STEPS
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)
