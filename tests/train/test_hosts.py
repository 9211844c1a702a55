"""Several processes as one run: which rows are whose, and (slow) real processes over loopback, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from bytelm import codec
from bytelm.checkpoint import list_steps
from bytelm.config import ConfigError, HostsConfig, MeshConfig
from bytelm.metrics import read_metrics
from bytelm.parallel import hosts
from bytelm.parallel.mesh import make_mesh
from tiny import run_config


class Elsewhere:
    """A device of another process."""

    def __init__(self, device, process):
        self.device, self.process_index = device, process


@pytest.mark.parametrize("data,fsdp,tensor,mine", [(8, 1, 1, 2), (2, 4, 1, 2), (4, 1, 2, 2), (1, 4, 2, 2)])
def test_rows_of_a_process(data, fsdp, tensor, mine, monkeypatch):
    """Eight devices as two processes of four: each owns half the rows, and together they own all."""
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    assert hosts.rows_here(mesh, 16) == list(range(16))
    real = jax.sharding.NamedSharding.devices_indices_map

    def two_processes(self, shape):
        return {Elsewhere(d, d.id // 4): index for d, index in real(self, shape).items()}

    monkeypatch.setattr(jax.sharding.NamedSharding, "devices_indices_map", two_processes)
    owned = []
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        owned.append(hosts.rows_here(mesh, 16))
    assert sorted(owned[0] + owned[1]) == list(range(16)) and len(owned[0]) == 8


def test_a_row_over_two_processes(monkeypatch):
    """Its pieces may be, and both processes read it; the same piece may not."""
    real = jax.sharding.NamedSharding.devices_indices_map
    monkeypatch.setattr(
        jax.sharding.NamedSharding, "devices_indices_map",
        lambda self, shape: {Elsewhere(d, d.id // 4): i for d, i in real(self, shape).items()},
    )  # fmt: skip
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert hosts.rows_here(make_mesh(MeshConfig(data=1, sequence=4, tensor=2)), 3) == [0, 1, 2]
        own = hosts.rows_here(make_mesh(MeshConfig(data=2, sequence=4)), 4)
        assert own == [[0, 1], [2, 3]][process]
    mesh = make_mesh(MeshConfig(data=1, tensor=8))
    with pytest.raises(ConfigError, match=r"mesh\.tensor=8 spreads a row over several processes"):
        hosts.rows_here(mesh, 16)


def test_rows_come_to_their_devices():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    rows = np.arange(16 * 3).reshape(16, 3)
    placed = hosts.place_rows(rows, mesh, range(16), 16)
    assert (np.asarray(placed) == rows).all() and placed.sharding.spec[0] == ("data", "fsdp")


@pytest.mark.parametrize(
    "config,env,message",
    [
        ({"processes": 2}, {}, "give host:port"),
        ({"coordinator": "localhost:1"}, {}, "give host:port"),
        ({"coordinator": "localhost:1", "processes": 2, "process": 2}, {}, "hosts.process=2"),
        ({}, {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID"),
        ({}, {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two'"),
    ],
)
def test_what_is_missing_is_said(config, env, message, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        hosts.start(HostsConfig(**config))


def test_nobody_answers(monkeypatch, capsys):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:1: process 0 did not answer in 1 s .*is it started"):
        hosts.start(HostsConfig(processes=2, process=1, start_seconds=1))
    assert "process 1 of 2: waiting for the others at 127.0.0.1:1" in capsys.readouterr().err
    for wrong in ("nowhere", "host:port"):
        with pytest.raises(ConfigError, match="must be host:port"):
            hosts.start(HostsConfig(coordinator=wrong, processes=2, process=1))
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS")
    with pytest.raises(ConfigError, match=r"hosts\.process=1: name the coordinator"):
        hosts.start(HostsConfig(process=1))


def test_one_process_joins_nobody(monkeypatch):
    hosts.start(HostsConfig())
    hosts.start(HostsConfig(coordinator="localhost:1", processes=1, process=0))
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    hosts.start(HostsConfig())
    assert not hosts.several() and hosts.is_first() and hosts.gather({"a": 1}) == [{"a": 1}]


def losses(run_dir):
    return {r["step"]: r["loss"] for r in read_metrics(run_dir / "metrics.jsonl") if "loss" in r and "event" not in r}


@pytest.fixture
def start(root, tmp_path):
    """start(name, processes, **sections) -> a launched run of four devices in so many processes."""

    def start(name, processes, *, steps=16, options=(), sequence=1, **sections):
        mesh = {"data": 2, "fsdp": 2} if sequence == 1 else {"data": 1, "sequence": sequence}
        config = run_config(tmp_path / name, steps=steps, mesh=mesh, eval={"every": 8}, **sections)
        path = tmp_path / f"{name}.yaml"
        path.write_text(codec.dumps(config))
        env = {**os.environ, "PYTHONPATH": str(root), "XDG_CACHE_HOME": str(tmp_path / "cache"),
               "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2", "XLA_FLAGS": "",
               "JAX_COMPILATION_CACHE_DIR": os.path.expanduser("~/.cache/bytelm/test-xla")}  # fmt: skip
        command = [sys.executable, str(root / "scripts" / "launch_local"), str(processes), "--devices-each",
                   str(4 // processes), "--log-dir", str(tmp_path / f"{name}-log"), *options, "--",
                   sys.executable, "-m", "bytelm.cli", "train", str(path)]  # fmt: skip
        return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True), tmp_path / name

    return start


def finish(process, status=0):
    said = process.communicate(timeout=400)[1]
    assert process.returncode == status, said


def close(a, b):
    assert sorted(a) == sorted(b)
    np.testing.assert_allclose([a[k] for k in sorted(a)], [b[k] for k in sorted(a)], rtol=0, atol=1e-5)


def wait_for_step(process, run, step):
    stop = time.monotonic() + 200
    while time.monotonic() < stop and process.poll() is None:
        if max(losses(run), default=0) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step}")


@pytest.mark.slow
def test_rows_in_pieces_over_two_processes(start):
    """Each reads every row and holds half of it; the losses are those of whole rows."""
    process, cut = start("cut", 2, steps=6, sequence=4)
    finish(process)
    process, whole = start("whole", 1, steps=6)
    finish(process)
    close(losses(cut), losses(whole))


@pytest.mark.slow
def test_two_processes_are_one_run(start, tmp_path):
    """Equal losses to one process; one of them killed: both start again from the checkpoint, to the same losses; asked
    to stop: both do, and one process with workers goes on to the same end."""
    process, two = start("two", 2)  # first, so that both find the text not unpacked yet
    finish(process)
    process, one = start("one", 1)
    finish(process)
    wanted = losses(one)
    close(losses(two), wanted)
    assert codec.load(two / "config.yaml").hosts == HostsConfig()
    held = [[r["heldout_bpb"] for r in read_metrics(run / "metrics.jsonl") if "heldout_bpb" in r] for run in (one, two)]
    np.testing.assert_allclose(*held, atol=1e-5)

    process, killed = start("killed", 2)
    wait_for_step(process, killed, 5)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[1]), signal.SIGKILL)
    finish(process)
    assert losses(killed) == losses(two)  # the same processes and order of sums: to the bit
    starts = [r for r in read_metrics(killed / "metrics.jsonl") if r.get("event") == "start"]
    assert all(r["processes"] == 2 for r in starts)

    process, stopped = start("stopped", 2, checkpoint={"every": 1000})
    wait_for_step(process, stopped, 4)
    process.send_signal(signal.SIGTERM)
    finish(process, 75)
    (step,) = list_steps(stopped / "checkpoints")
    assert 4 <= step < 16
    process, _ = start("stopped", 1, checkpoint={"every": 1000}, data={"workers": 2})
    finish(process)
    close(losses(stopped), wanted)


@pytest.mark.slow
def test_two_processes_fall_back_from_a_damaged_checkpoint(start):
    process, run = start("run", 2, steps=6)
    finish(process)
    wanted = losses(run)
    largest = max((run / "checkpoints" / "6" / "params").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    largest.write_bytes(largest.read_bytes()[:100])
    process, _ = start("run", 2, steps=6)
    finish(process)
    assert (run / "checkpoints" / "broken-6").is_dir() and losses(run) == wanted


@pytest.mark.slow
def test_the_first_process_killed(start):
    """The one that the others find each other by, and that writes: all start again all the same."""
    process, run = start("run", 2, checkpoint={"every": 3})
    wait_for_step(process, run, 7)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[0]), signal.SIGKILL)
    finish(process)
    assert sorted(losses(run)) == list(range(1, 17))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)


@pytest.mark.slow
def test_a_mistake_in_one_process_ends_all(root, tmp_path):
    """It says what is wrong and leaves with status 2; the other does not wait for ever, and nothing starts again."""
    config = run_config(tmp_path / "run", mesh={"data": 2}, train={"compilation_cache": "off"})
    (tmp_path / "c.yaml").write_text(codec.dumps(config))
    script = (
        f"if [ $JAX_PROCESS_ID = 1 ]; then missing='--data.train {tmp_path}/nothing'; fi; "
        f"exec {sys.executable} -m bytelm.cli train {tmp_path}/c.yaml $missing"
    )
    command = [sys.executable, str(root / "scripts" / "launch_local"), "2", "--devices-each", "1", "--log-dir",
               str(tmp_path / "log"), "--", "bash", "-c", script]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 2 and "process 1 ended with status 2" in said and "starting all again" not in said
    log = (tmp_path / "log" / "1.log").read_text()
    assert "process 1 of 2 ends with status 2" in log and "nothing' matches no file" in log and "Traceback" not in log


def test_launch_local_without_a_command(root):
    for arguments in (["2"], ["0", "--", "true"], ["two", "--", "true"]):
        done = subprocess.run([sys.executable, str(root / "scripts" / "launch_local"), *arguments], capture_output=True)
        assert done.returncode == 2


def test_launch_local_restarts_and_gives_up(root, tmp_path):
    """A command that fails twice and then works; one that always fails; one whose failure is final."""
    launcher = [sys.executable, str(root / "scripts" / "launch_local"), "2", "--restarts", "2", "--"]
    count = 'echo $JAX_PROCESS_ID $JAX_NUM_PROCESSES >> tries; [ "$(grep -c ^0 tries)" -ge 3 ] || exit 1'
    assert subprocess.run([*launcher, "bash", "-c", count], cwd=tmp_path).returncode == 0
    tries = sorted((tmp_path / "tries").read_text().split("\n"))
    assert tries.count("0 2") == tries.count("1 2") == 3
    assert subprocess.run([*launcher, "bash", "-c", "echo x >> fails; exit 7"], cwd=tmp_path).returncode == 7
    assert (tmp_path / "fails").read_text().count("x") == 6
    assert subprocess.run([*launcher, "bash", "-c", "echo x >> final; exit 3"], cwd=tmp_path).returncode == 3
    assert (tmp_path / "final").read_text().count("x") == 2
