"""The reference's cases through `bytelm parity`: logits, boundaries, steps, losses, the gradient of every weight."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bytelm.cli import run as cli
from bytelm.interop.parity import TOLERANCES
from tiny import mostly_slow

CASES = ("one_stage", "two_stage", "window", "batch3_ragged")


@pytest.mark.parametrize("case", mostly_slow(CASES, "one_stage"))
def test_reference_case_passes(root, case, capsys):
    folder = root / f"tests/golden/hnet_{case}"
    io = load_file(folder / "io.safetensors")
    weights = load_file(folder / "weights.safetensors")
    assert {n.removeprefix("grad.") for n in io if n.startswith("grad.")} == set(weights)  # every weight has one
    assert cli(["parity", str(folder)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["family"] == "hnet" and record["ok"] and record["boundaries_equal"] is True
    for key, limit in (("max_abs_logit_error", 2e-5), ("max_abs_prob_error", 1e-6), ("max_abs_step_error", 2e-5),
                       ("loss_error", 2e-6), ("max_rel_grad_error", 1e-4)):  # fmt: skip
        assert record[key] <= limit == TOLERANCES[key], key


@pytest.mark.slow
@pytest.mark.parametrize(
    "tensor,change,key",
    [
        ("step.logits", lambda x: x + 1e-4, "max_abs_step_error"),
        ("stage1.padded.boundary_mask", lambda x: ~x.astype(bool), "boundaries_equal"),
        ("stage0.padded.boundary_prob", lambda x: x * (1 - 1e-4), "max_abs_prob_error"),
        ("loss.ratio", lambda x: x + 1e-5, "loss_error"),
    ],
)
def test_a_case_that_was_tampered_with_fails(root, tmp_path, tensor, change, key, capsys):
    case = shutil.copytree(root / "tests/golden/hnet_two_stage", tmp_path / "case")
    io = load_file(case / "io.safetensors")
    io = {n: x for n, x in io.items() if not n.startswith("grad.")}  # faster; those are checked above
    io[tensor] = np.asarray(change(io[tensor])).copy()
    save_file(io, case / "io.safetensors")
    assert cli(["parity", str(case)]) == 1
    record = json.loads(capsys.readouterr().out)
    bad = [k for k, limit in TOLERANCES.items() if record[k] is not None and record[k] > limit]
    bad += [k for k in ("boundaries_equal", "greedy_equal") if record[k] is False]
    assert bad == [key] and record["max_rel_grad_error"] is None


def test_weights_that_do_not_fit_are_named(root, tmp_path, capsys):
    case = shutil.copytree(root / "tests/golden/hnet_one_stage", tmp_path / "case")
    weights = load_file(case / "weights.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, case / "weights.safetensors")
    assert cli(["parity", str(case)]) == 2
    assert "missing lm_head.weight" in capsys.readouterr().err
