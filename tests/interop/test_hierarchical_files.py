"""HAT, SpaceByte and MegaByte from their published names: parity, folders, what does not fit."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bytelm
from bytelm.checkpoint import CheckpointError
from bytelm.cli import run as cli
from bytelm.config import ConfigError
from bytelm.interop import hierarchical
from bytelm.interop.parity import run_case
from tiny import mostly_slow

CASES = ("hat_tiny", "spacebyte_tiny", "spacebyte_periodic_tiny", "megabyte_tiny")


@pytest.fixture
def golden(root):
    return root / "tests/golden/hierarchical"


@pytest.fixture
def folder(tmp_path, golden):
    """A HAT as it is published: config.json without a wrapping, model.safetensors."""
    record = json.loads((golden / "hat_tiny/config.json").read_text())["config"]
    record |= {"model_type": hierarchical.MODEL_TYPE, "max_position_embeddings": 300}
    (tmp_path / "config.json").write_text(json.dumps(record))
    shutil.copy(golden / "hat_tiny/weights.safetensors", tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("case", mostly_slow(CASES, "hat_tiny"))
def test_parity(golden, case, capsys):
    assert cli(["parity", str(golden / case)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["family"] == case.split("_")[0] and found["max_abs_logit_error"] < 2e-5
    assert found["max_abs_step_error"] < 2e-5 and found["boundaries_equal"] in (True, None)


@pytest.mark.parametrize("case", CASES)
def test_parity_sees_a_changed_weight(golden, case, tmp_path):
    shutil.copytree(golden / case, tmp_path / case)
    weights = load_file(tmp_path / case / "weights.safetensors")
    name = next(
        n for n in weights if n.endswith(("layers.1.mlp.up_proj.weight", "blocks.0.feedforward.linear_1.weight"))
    )
    weights[name] = weights[name] * 1.02
    save_file(weights, tmp_path / case / "weights.safetensors")
    assert not run_case(tmp_path / case)["ok"]


def test_a_published_folder(folder, tmp_path):
    lm = bytelm.load(folder)
    assert lm.window == 300 and lm.ids.start == 193 and lm.ids.end == 192
    text = "Größe über 你好".encode()
    assert np.isfinite(lm.score(text).per_byte).all()
    released, strict = lm.released().score(text).per_byte, lm.score(text).per_byte
    np.testing.assert_allclose(released[:2], strict[:2], atol=1e-6)
    assert np.abs(released - strict).max() > 1e-4
    assert cli(["convert", str(folder), str(tmp_path / "ours")]) == 0
    np.testing.assert_array_equal(bytelm.load(tmp_path / "ours").logprobs(text), lm.logprobs(text))


def test_dead_projections_change_nothing(folder):
    before = bytelm.load(folder).logprobs("Größe üb")
    weights = load_file(folder / "model.safetensors")
    dead = [name for name in weights if name.endswith(hierarchical.DEAD)]
    assert len(dead) == 6
    save_file({n: w * 0 if n in dead else w for n, w in weights.items()}, folder / "model.safetensors")
    np.testing.assert_array_equal(bytelm.load(folder).logprobs("Größe üb"), before)
    save_file({n: w for n, w in weights.items() if n not in dead}, folder / "model.safetensors")
    np.testing.assert_array_equal(bytelm.load(folder).logprobs("Größe üb"), before)


def test_a_guide_in_the_first_layer_only(folder):
    """As such models are published: later layers keep the norms of guides that they do not have."""
    record = json.loads((folder / "config.json").read_text())
    record["decoder_config"]["cross_attn_every_layer"] = False
    (folder / "config.json").write_text(json.dumps(record))
    weights = load_file(folder / "model.safetensors")
    save_file({n: w for n, w in weights.items() if "layers.1.cross_attention" not in n}, folder / "model.safetensors")
    assert np.isfinite(bytelm.load(folder).score("Größe").total)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.update(eos_token_id=200), "eos_token_id=200"),
        (lambda r: r["encoder_config"].update(is_neox_style=False), "encoder_config.is_neox_style"),
        (lambda r: r["decoder_config"]["cross_attention_config"].update(word_window_size=2), "word_window_size=2"),
        (lambda r: r["encoder_config"]["cross_attention_config"].update(hidden_size=64), "hidden_size=64"),
        (lambda r: r.update(max_position_embeddings=-1), "max_position_embeddings=-1"),
        (lambda r: r["special_token_dict"].update({"<|begin_of_text|>": 65}), "model.start=65"),
    ],
)
def test_configs_that_would_be_read_wrongly(folder, change, message):
    record = json.loads((folder / "config.json").read_text())
    change(record)
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=message):
        bytelm.load(folder)


def test_keys_that_are_null(folder):
    record = json.loads((folder / "config.json").read_text())
    record |= {"special_token_dict": None, "max_position_embeddings": None, "eos_token_id": None}
    for part in ("encoder_config", "backbone_config", "decoder_config"):
        record[part]["head_dim"] = None
    (folder / "config.json").write_text(json.dumps(record))
    lm = bytelm.load(folder)
    assert lm.window == 8192 and lm.ids.start == 192


def test_released_scores_are_the_reference_s(folder, golden):
    """Text by text, with the last bytes of a character at the end: the golden's own logits."""
    io = load_file(golden / "hat_tiny/io.safetensors")
    lm = bytelm.load(folder, reserved="error").released()
    row, n = io["tokens"][0], int(io["n_bytes"][0])
    ids = row[:n].astype(np.int32)
    assert ids[0] == 193
    text = ids[1:].astype(np.uint8).tobytes()
    logits = io["logits"][0, : n - 1].astype(np.float64)
    logits[:, [b for b in lm.ids.reserved if b != 192]] = -np.inf
    want = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))[np.arange(n - 1), list(text)]
    np.testing.assert_allclose(lm.score(text).per_byte, want, atol=1e-4)
    marks = lm._marks.marks(bytes([193]) + "你".encode())
    assert (marks & 1).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("lm_head.weight"), "missing lm_head.weight"),
        (lambda w: w.update(extra=np.zeros(2, np.float32)), "unknown extra"),
        (lambda w: w.update({"layer_norm.weight": np.zeros(3, np.float32)}), "decoder/norm/scale has shape"),
        (
            lambda w: w.update({"backbone.layers.0.self_attn.q_proj.weight": np.zeros((7, 48), np.float32)}),
            "does not fit",
        ),
    ],
)
def test_weights_that_do_not_fit(folder, change, message):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        bytelm.load(folder)


def test_configs_that_cannot_be_read(golden):
    record = json.loads((golden / "hat_tiny/config.json").read_text())
    record["config"]["backbone_config"].pop("hidden_size")
    with pytest.raises(ConfigError, match="has no hidden_size"):
        hierarchical.config_from(record, "x")
    record["config"]["backbone_config"] |= {"hidden_size": 48, "rope_scaling": {"rope_type": "yarn"}}
    with pytest.raises(ConfigError, match="'yarn' is not known"):
        hierarchical.config_from(record, "x")
    record["config"]["backbone_config"]["rope_scaling"] = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert hierarchical.config_from(record, "x").backbone.rope_stretch == (8.0, 1.0, 4.0, 8192.0)
    record = json.loads((golden / "spacebyte_tiny/config.json").read_text())
    record["config"]["nonlinear"] = "GELU"
    with pytest.raises(ConfigError, match="nonlinear='GELU'"):
        hierarchical.config_from(record, "x")
