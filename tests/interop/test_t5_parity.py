"""`bytelm parity` on the reference's ByT5, MrT5 and pooling cases."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bytelm.checkpoint import CheckpointError
from bytelm.interop.parity import run_case
from tiny import mostly_slow

CASES = {
    "byt5_plain": {"max_rel_grad_error", "greedy_equal"},
    "mrt5_soft_softmax1": {"max_rel_grad_error", "max_abs_gate_error", "positions_equal"},
    "mrt5_hard_softmax1": {"max_abs_gate_error", "positions_equal", "greedy_equal"},
    "mrt5_softmax_both": {"max_rel_grad_error", "max_abs_gate_error", "positions_equal"},
    "bp_mean_pool": {"boundaries_equal", "max_abs_gate_error"},
    "cp_conv_pool": set(),
}
ALWAYS = {"max_abs_logit_error", "loss_error", "max_abs_step_error"}


def parity(root, case) -> tuple[int, dict]:
    """The command as users run it, without the tests' compiler options: they round worse."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "bytelm.cli", "parity", str(case)]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr[-2000:]
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("case", mostly_slow(CASES, "byt5_plain", "mrt5_hard_softmax1"))
def test_golden_case(root, case):
    code, record = parity(root, root / "tests/golden/mrt5" / case)
    assert code == 0 and record["ok"], record
    assert all(record[key] is not None for key in CASES[case] | ALWAYS), record


@pytest.mark.slow
def test_a_case_that_differs_is_not_ok(root, tmp_path):
    case = tmp_path / "case"
    shutil.copytree(root / "tests/golden/mrt5/mrt5_hard_softmax1", case)
    io = load_file(case / "io.safetensors")
    io["hard.keep_mask"] = 1 - io["hard.keep_mask"]
    save_file(io, case / "io.safetensors")
    code, record = parity(root, case)
    assert code == 1 and not record["ok"]
    assert record["positions_equal"] is False
    assert record["max_abs_logit_error"] <= 2e-5
    assert record["max_abs_gate_error"] <= record["tolerances"]["max_abs_gate_error"] == 30 * 2e-6


@pytest.mark.slow
def test_a_gate_that_is_off_by_a_hair_is_not_ok(root, tmp_path):
    case = tmp_path / "case"
    shutil.copytree(root / "tests/golden/mrt5/mrt5_soft_softmax1", case)
    io = load_file(case / "io.safetensors")
    io["soft.gate_values"] = io["soft.gate_values"] + np.float32(1e-4)
    save_file(io, case / "io.safetensors")
    record = run_case(case)
    assert not record["ok"] and record["max_abs_gate_error"] > 6e-5 and record["positions_equal"]


def test_broken_cases_are_named(root, tmp_path):
    case = tmp_path / "case"
    shutil.copytree(root / "tests/golden/mrt5/byt5_plain", case)
    weights = load_file(case / "weights.safetensors")
    gone = weights.pop("decoder.block.1.layer.1.EncDecAttention.k.weight")
    save_file(weights | {"extra": np.zeros(1, np.float32)}, case / "weights.safetensors")
    with pytest.raises(
        CheckpointError, match=r"missing decoder.block.1.layer.1.EncDecAttention.k.weight; unknown extra"
    ):
        run_case(case)
    save_file(weights | {"decoder.block.1.layer.1.EncDecAttention.k.weight": gone.T}, case / "weights.safetensors")
    with pytest.raises(CheckpointError, match="has shape"):
        run_case(case)
    (case / "config.json").write_text(json.dumps({"model_type": "t5", "d_kv": 12, "feed_forward_proj": "relu"}))
    with pytest.raises(Exception, match="gated GELU"):
        run_case(case)
