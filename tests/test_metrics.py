"""The metrics file across crashes, the plot, and the device table."""

import json

import pytest

from bytelm.devices import find_chip, measured_matmul_rate
from bytelm.metrics import MetricsLog, git_commit, plot_losses, read_metrics, versions
from bytelm.train.progress import amount, clock


def test_a_resumed_file_holds_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.5}\n{"step": 4, "lo')
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
    log = MetricsLog(tmp_path, resume_step=2)
    log.write({"step": 3, "loss": 1.25, "bad": float("nan")})
    log.write_once({"step": 3, "loss": 1.25, "bad": None})
    log.close()
    assert read_metrics(path) == [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 1.25, "bad": None},
    ]


def test_plot(tmp_path):
    records = [{"step": i, "bytes": i * 1000, "bpb": 8 / i} for i in range(1, 30)]
    records += [{"step": 29, "bytes": 29000, "heldout_bpb": 1.0}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    plot_losses(tmp_path / "m.jsonl", tmp_path / "a.png", {"xz": 2.5})
    (tmp_path / "empty.jsonl").touch()
    plot_losses(tmp_path / "empty.jsonl", tmp_path / "b.png")
    assert all((tmp_path / n).read_bytes()[:4] == b"\x89PNG" for n in ("a.png", "b.png"))


KINDS = {
    "TPU v4": "TPU v4",
    "TPU v5 lite": "TPU v5e",
    "TPU v5": "TPU v5p",
    "TPU v6 lite": "TPU v6e",
    "TPU7x": "TPU7x",
    "NVIDIA H100 80GB HBM3": "NVIDIA H100 SXM",
    "NVIDIA H200": "NVIDIA H200",
    "NVIDIA A100-SXM4-80GB": "NVIDIA A100 80GB",
    "NVIDIA L4": "NVIDIA L4",
    "NVIDIA A100-SXM4-40GB": None,
    "NVIDIA H100 PCIe": None,
    "NVIDIA GH200 480GB": None,
    "NVIDIA L40S": None,
    "cpu": None,
}


@pytest.mark.parametrize("kind,name", KINDS.items())
def test_device_table(kind, name):
    chip = find_chip(kind)
    assert (chip.name if chip else None) == name


def test_matmul_rate_and_versions():
    assert measured_matmul_rate("float32", 0.05) > 1e8
    assert versions()["jax"][0].isdigit()
    commit = git_commit()
    assert commit is None or len(commit.rstrip("+")) == 40


def test_how_numbers_read():
    assert [clock(s) for s in (5, 75, 4000)] == ["0:05", "1:15", "1:06:40"]
    assert [amount(n) for n in (0, 999, 1536, 3.07e6)] == ["0 B", "999 B", "1.54 kB", "3.07 MB"]
