"""Processes that are killed or asked to stop: nothing is lost, and what comes after is bit-identical."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from bytelm import codec
from bytelm.checkpoint import list_steps
from bytelm.metrics import read_metrics
from tiny import run_config


def losses(run_dir):
    return {r["step"]: r["loss"] for r in read_metrics(run_dir / "metrics.jsonl") if "loss" in r}


@pytest.fixture
def start(tmp_path, root):
    def start(name, data=None, **sections):
        config = run_config(tmp_path / name, steps=30, data={"batch_size": 4, **(data or {})}, **sections)
        path = tmp_path / f"{name}.yaml"
        path.write_text(codec.dumps(config))
        env = {**os.environ, "PYTHONPATH": str(root), "XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
        env |= {"JAX_COMPILATION_CACHE_DIR": os.path.expanduser("~/.cache/bytelm/test-xla"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}  # fmt: skip
        command = [sys.executable, "-m", "bytelm.cli", "train", str(path)]
        return subprocess.Popen(
            command, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ), tmp_path / name

    return start


def wait_for_step(process, run_dir, step, seconds=120):
    stop = time.monotonic() + seconds
    while time.monotonic() < stop and process.poll() is None:
        if max(losses(run_dir), default=0) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step}: {process.communicate()}")


@pytest.mark.slow
def test_kill_at_a_random_step_and_resume_is_bit_identical(start):
    process, whole = start("whole")
    assert process.wait(timeout=200) == 0, process.communicate()
    kills = 0
    while True:
        process, killed = start("killed")
        before = max(losses(killed), default=0)
        if before < 26 and kills < 3:
            wait_for_step(process, killed, random.randint(before + 1, before + 9))
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
            continue
        assert process.wait(timeout=200) == 0, process.communicate()
        break
    assert kills >= 2
    assert losses(killed) == losses(whole) and len(losses(whole)) == 30
    assert list_steps(killed / "checkpoints") == list_steps(whole / "checkpoints")


@pytest.mark.slow
def test_interrupt_of_a_whole_pipeline_still_saves(start):
    """Ctrl-C reaches `tee` as well: our messages go nowhere, the checkpoint is saved all the same."""
    process, run = start("run", checkpoint={"every": 1000})
    wait_for_step(process, run, 3)
    process.stderr.close()
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 75
    assert len(list_steps(run / "checkpoints")) == 1


@pytest.mark.slow
def test_workers_end_with_a_killed_run(start):
    process, run = start("run", data={"workers": 2})
    wait_for_step(process, run, 2)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) >= 2
    process.kill()
    process.wait()
    stop = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{child}") for child in children) and time.monotonic() < stop:
        time.sleep(0.1)
    assert not [child for child in children if os.path.exists(f"/proc/{child}")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_saves_and_says_how_to_go_on(start, number):
    process, run = start("run", checkpoint={"every": 1000})
    wait_for_step(process, run, 3)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    saved = list_steps(run / "checkpoints")
    assert len(saved) == 1 and 3 <= saved[0] < 30
    assert (
        f"stopped by {signal.Signals(number).name} at step {saved[0]}, saved; go on with:  bytelm train {run}" in said
    )
    assert "Traceback" not in said
