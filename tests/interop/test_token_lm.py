"""Published token decoders: configs, tensors, and equal logits with transformers on random tiny models."""

import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from bytelm.byteview.cover import Node, chain
from bytelm.byteview.readings import State
from bytelm.byteview.token_model import TokenModel
from bytelm.checkpoint import CheckpointError
from bytelm.config import ConfigError
from bytelm.interop.published import open_tensors
from bytelm.interop.token_lm import config_from, params_from
from bytelm.models.token_lm import token_structure

SHAPE = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)  # fmt: skip
FAMILIES = {
    "gpt2": ("GPT2", dict(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
    "llama2": ("Llama", dict(SHAPE, num_key_value_heads=4)),
    "llama3": ("Llama", dict(SHAPE, rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama_biases": ("Llama", dict(SHAPE, attention_bias=True, mlp_bias=True, head_dim=12)),
    "linear": ("Llama", dict(SHAPE, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0))),
    "mistral": ("Mistral", dict(SHAPE, sliding_window=7)),
    "qwen2": ("Qwen2", dict(SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(SHAPE, head_dim=16)),
}
MAKE = """
import json, sys, torch, transformers
from safetensors.torch import save_file
folder, families = sys.argv[1], json.loads(sys.argv[2])
torch.manual_seed(0)
ids = torch.randint(0, 96, (2, 24))
for name, (kind, fields) in families.items():
    config = getattr(transformers, kind + "Config")(**fields)
    config._attn_implementation = "eager"
    head = kind + ("LMHeadModel" if kind == "GPT2" else "ForCausalLM")
    model = getattr(transformers, head)(config).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p) * (p.data.std() if p.numel() > 1 and p.data.std() > 0 else 1.0)
    model.save_pretrained(f"{folder}/{name}")
    with torch.no_grad():
        save_file({"ids": ids, "logits": model(ids).logits.contiguous()}, f"{folder}/{name}/io.safetensors")
"""


def read(folder):
    record = json.loads((folder / "config.json").read_text())
    config = config_from(record, str(folder))
    graph, abstract = token_structure(config)
    return config, graph, params_from(open_tensors(folder / "model.safetensors"), config, abstract, str(folder))


@pytest.mark.slow
def test_logits_equal_transformers(tmp_path, reference_python):
    run = [reference_python, "-c", MAKE, str(tmp_path), json.dumps(FAMILIES)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in FAMILIES:
        config, graph, params = read(tmp_path / name)
        io = load_file(tmp_path / name / "io.safetensors")
        with jax.default_matmul_precision("highest"):
            ours = jax.jit(lambda p, i, graph=graph: nnx.merge(graph, p)(i))(params, io["ids"].astype(np.int32))
            as_tree = TokenModel(config, params).session(32).read(chain(io["ids"][0].tolist()))
        scale = np.abs(io["logits"]).max()
        np.testing.assert_allclose(ours, io["logits"], atol=2e-5 * scale, err_msg=name)
        np.testing.assert_allclose(as_tree, io["logits"][0], atol=2e-5 * scale, err_msg=name)


def test_tree_equals_rows(root):
    """A tree of two branches gives the logits of two rows; a cache that has grown gives the same."""
    config, graph, params = read(root / "tests/golden/convert/model_tiny_sp")
    rows = np.array([[1, 300, 500, 700, 400], [1, 300, 500, 900, 800]], np.int32)
    with jax.default_matmul_precision("highest"):
        whole = np.asarray(jax.jit(lambda p, i: nnx.merge(graph, p)(i))(params, jnp.asarray(rows)))
        first = chain(rows[0].tolist())
        second = [Node(900, first[2], 3, 3, State(), (), (), [])]
        second.append(Node(800, second[0], 4, 4, State(), (), (), []))
        session = TokenModel(config, params).session(4)
        out = session.read(first[:3])
        rest = session.read([first[3], second[0]])
        last = session.read([first[4], second[1]])
        session.forget([first[3], first[4]])
        again = session.read([Node(700, first[2], 3, 3, State(), (), (), [])])
    np.testing.assert_allclose(out, whole[0, :3], atol=2e-5)
    np.testing.assert_allclose(rest, whole[:, 3], atol=2e-5)
    np.testing.assert_allclose(last, whole[:, 4], atol=2e-5)
    np.testing.assert_allclose(again[0], whole[0, 3], atol=2e-5)


def test_what_is_refused(root):
    folder = root / "tests/golden/convert/model_tiny_sp"
    record = json.loads((folder / "config.json").read_text())
    with pytest.raises(ConfigError, match="has no hidden_size"):
        config_from({k: v for k, v in record.items() if k != "hidden_size"}, "x")
    with pytest.raises(ConfigError, match="'yarn'"):
        config_from({**record, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "x")
    with pytest.raises(ConfigError, match="'relu'"):
        config_from({**record, "hidden_act": "relu"}, "x")
    config = config_from({**record, "num_hidden_layers": 1}, "x")
    tensors = open_tensors(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unknown model\.layers\.1"):
        params_from(tensors, config, token_structure(config)[1], "x")
    config = config_from({**record, "num_hidden_layers": 3}, "x")
    with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.2"):
        params_from(tensors, config, token_structure(config)[1], "x")
    config = config_from({**record, "intermediate_size": 255}, "x")
    with pytest.raises(CheckpointError, match="shape"):
        params_from(tensors, config, token_structure(config)[1], "x")
