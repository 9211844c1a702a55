"""`bytelm parity` on the committed case, and on cases that were tampered with."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bytelm.cli import run as cli
from bytelm.interop.parity import run_case
from bytelm.interop.weights import load_config
from bytelm.models.build import structure

KEYS = ["family", "max_abs_logit_error", "max_abs_prob_error", "boundaries_equal", "max_abs_gate_error",
        "positions_equal", "greedy_equal", "max_abs_step_error", "loss_error", "max_rel_grad_error", "tolerances",
        "precision", "device", "ok"]  # fmt: skip


@pytest.fixture
def case(tmp_path, root):
    return shutil.copytree(root / "tests/golden/flat_tiny", tmp_path / "case")


def tamper(file, name, change):
    tensors = load_file(file)
    tensors[name] = np.asarray(change(tensors[name])).copy()
    save_file(tensors, file)


def test_the_committed_case_passes(case, capsys):
    """Logits, loss and the gradient of every weight, against a numpy twin in float64 and central differences."""
    assert cli(["parity", str(case)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record) == KEYS and record["ok"] and record["family"] == "flat"
    assert record["max_abs_logit_error"] < 2e-5 and record["loss_error"] < 2e-6 and record["max_rel_grad_error"] < 1e-4
    io = load_file(case / "io.safetensors")
    import jax

    from bytelm.parallel.rules import path_string

    names = {f"grad.{path_string(p)}" for p, _ in jax.tree.leaves_with_path(structure(load_config(case)[0])[1])}
    assert names == {n for n in io if n.startswith("grad.")}


@pytest.mark.parametrize(
    "name,change,key",
    [("logits", lambda x: x + 1e-4, "max_abs_logit_error"), ("loss", lambda x: x + 1e-5, "loss_error"),
     ("grad.embed/table", lambda x: x * 1.001, "max_rel_grad_error"), ("logits", lambda x: -x, "greedy_equal")],
)  # fmt: skip
def test_a_wrong_reference_fails(case, capsys, name, change, key):
    tamper(case / "io.safetensors", name, change)
    assert cli(["parity", str(case)]) == 1
    record = json.loads(capsys.readouterr().out)
    assert not record["ok"] and (record[key] is False or record[key] > record["tolerances"][key])


def test_cached_steps_are_checked_where_rows_hold_one_document(case):
    io = load_file(case / "io.safetensors")
    first = 11  # length of the first document of each row
    save_file(
        {"inputs": io["inputs"][:, :first].copy(), "logits": io["logits"][:, :first].copy()}, case / "io.safetensors"
    )
    record = run_case(case)
    assert record["ok"] and record["max_abs_step_error"] < 2e-5 and record["loss_error"] is None


@pytest.mark.parametrize(
    "spoil,message",
    [
        (lambda c: (c / "config.json").unlink(), "no config.json"),
        (lambda c: (c / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda c: (c / "weights.safetensors").write_bytes(b"x" * 99), "weights.safetensors: cannot be read"),
        (
            lambda c: tamper(c / "weights.safetensors", "embed/table", lambda w: w[:, :-1]),
            r"embed/table should have shape",
        ),
        (lambda c: (c / "io.safetensors").unlink(), "io.safetensors: cannot be read"),
    ],
)
def test_unreadable_cases(case, capsys, spoil, message):
    spoil(case)
    assert cli(["parity", str(case)]) == 2
    assert message in capsys.readouterr().err
