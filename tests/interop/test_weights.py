"""Weights directories: written, read back, and what damaged ones say."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bytelm.interop.published import open_model
from bytelm.interop.weights import is_weights_dir, load_config, save_weights
from bytelm.lm import NetworkLM, load
from tiny import flat, network


@pytest.fixture
def saved(tmp_path):
    config = flat()
    _, params = network(config)
    save_weights(tmp_path / "w", config, params, context=48)
    return tmp_path / "w", config, params


def test_round_trip(saved):
    path, config, params = saved
    assert is_weights_dir(path) and load_config(path) == (config, 48)
    jax.tree.map(np.testing.assert_array_equal, open_model(path).read(), jax.tree.map(np.asarray, params))
    lm = load(path)
    assert isinstance(lm, NetworkLM) and lm.window == 48
    np.testing.assert_allclose(lm.logprobs(b"ab"), NetworkLM(config, params, 48).logprobs(b"ab"), atol=1e-6)
    assert load_file(path / "model.safetensors")["embed/table"].shape == (384, 32)


def test_bfloat16_tensors(saved, tmp_path):
    _, config, params = saved
    save_weights(tmp_path / "b", config, params, context=48, dtype="bfloat16")
    back = open_model(tmp_path / "b").read()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), back, jax.tree.map(np.asarray, params))
    assert (tmp_path / "b/model.safetensors").stat().st_size < 0.6 * (saved[0] / "model.safetensors").stat().st_size


def test_damage_is_named(saved):
    path, _, _ = saved
    tensors = load_file(path / "model.safetensors")
    wrong = {k: v for k, v in tensors.items() if k != "stack/norm/scale"} | {"extra": np.zeros(1)}
    wrong["embed/table"] = wrong["embed/table"][:5]
    save_file(wrong, path / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"missing stack/norm/scale; unknown extra; embed/table has shape \[5, 32\], the config says \[384, 32\]",
    ):
        open_model(path).read()
    (path / "model.safetensors").write_bytes(b"garbage" * 9)
    with pytest.raises(ValueError, match="cannot be read"):
        load(path)
    (path / "config.json").write_text(json.dumps({"bytelm_format": "bytelm-1", "context": 3}))
    with pytest.raises(ValueError, match="not a readable bytelm model config"):
        load(path)
