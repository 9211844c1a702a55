"""Models of tokens that were trained here (family tokens), as the decoders that the byte view reads, and as a folder of
transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from bytelm.config import ConfigError, TokensConfig
from bytelm.interop.backbone import IN_STACK
from bytelm.interop.token_lm import LLAMA, LLAMA_TOP, as_heads, as_out, as_turned, same
from bytelm.interop.weights import write_tensors
from bytelm.models.build import Params
from bytelm.models.token_lm import RotaryScaling, TokenLMConfig
from bytelm.windows import DEFAULT_WINDOW


def own_config(model: TokensConfig, row: int) -> TokenLMConfig:
    """The decoder of a model of tokens trained here on rows of `row` of them. With attention windows no place sees
    further than it did in training, so that its texts may be longer."""
    s = model.stack
    stretch = s.rope_stretch
    scaling = (
        RotaryScaling(kind="llama3", factor=stretch[0], low=stretch[1], high=stretch[2], original=int(stretch[3]))
        if stretch else None
    )  # fmt: skip
    return TokenLMConfig(
        vocabulary=model.vocabulary, d_model=s.d_model, layers=int(s.layout[1:]), num_heads=s.num_heads,
        kv_heads=s.kv_heads, head_dim=s.head_width, d_mlp=s.mlp_width,
        context=max(row, DEFAULT_WINDOW) if s.window else row, norm_eps=s.norm_eps, qk_norm=s.qk_norm == "head",
        rope_theta=s.rope_theta, scaling=scaling, tie_embeddings=model.tie_embeddings, window=s.window,
        dtype=model.dtype,
    )  # fmt: skip


def record_from(c: TokenLMConfig, start: int, end: int) -> dict[str, Any]:
    """The config.json of a decoder trained here, as transformers reads it: a Llama, with norms of queries and keys a
    Qwen 3, with windows a Mistral. Raises ConfigError where there is no such model."""
    if c.qk_norm and c.window:
        raise ConfigError("no published kind of model has both norms of queries and keys and windows everywhere")
    kind = "qwen3" if c.qk_norm else "mistral" if c.window else "llama"
    rope = {"rope_theta": c.rope_theta, "rope_type": "default"}
    if c.scaling is not None:
        rope |= {"rope_type": "llama3", "factor": c.scaling.factor, "low_freq_factor": c.scaling.low,
                 "high_freq_factor": c.scaling.high,
                 "original_max_position_embeddings": c.scaling.original}  # fmt: skip
    return {
        "model_type": kind, "architectures": [f"{kind.capitalize()}ForCausalLM"], "vocab_size": c.vocabulary,
        "hidden_size": c.d_model, "num_hidden_layers": c.layers, "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim, "intermediate_size": c.d_mlp,
        "max_position_embeddings": c.context, "rms_norm_eps": c.norm_eps, "hidden_act": "silu",
        "rope_theta": c.rope_theta, "rope_parameters": rope, "rope_scaling": None if c.scaling is None else rope,
        "tie_word_embeddings": c.tie_embeddings, "sliding_window": c.window or None, "attention_bias": False,
        "mlp_bias": False, "bos_token_id": start, "eos_token_id": end, "torch_dtype": "float32",
    }  # fmt: skip


def tensors_from(params: Params, c: TokenLMConfig) -> dict[str, NDArray]:
    """Parameters of a decoder under their published names, as transformers has them."""
    back: dict[Any, Callable[[NDArray], NDArray]] = {
        as_heads: lambda x: x.reshape(c.d_model, -1).T, as_out: lambda x: x.reshape(-1, c.d_model).T,
        as_turned: lambda x: x.T, same: lambda x: x,
    }  # fmt: skip
    out: dict[str, NDArray] = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        name, value = "/".join(str(key.key) for key in path), np.asarray(leaf)
        if name.startswith("blocks/"):
            there, turn = LLAMA[name.removeprefix("blocks/")]
            out |= {f"model.layers.{i}.{there}": back[turn](layer) for i, layer in enumerate(value)}
        else:
            there, turn = LLAMA_TOP[name]
            out[there] = back[turn](value)
    return out


def decoder_params(params: Params, config: TokensConfig) -> Params:
    """The parameters of a token decoder from those of a model of tokens trained here (rows of its table that stand for
    no token left out)."""
    run, blocks = params["stack"]["run0"], {}
    for there, here in IN_STACK.items():
        if "_norm/norm" in there and config.stack.qk_norm == "none":
            continue
        leaf = run
        for part in there.split("/"):
            leaf = leaf[part]
        name, kind = here.split("/")
        blocks.setdefault(name, {})[kind] = leaf
    out = {
        "embed": {"table": params["embed"]["table"][: config.vocabulary]}, "blocks": blocks,
        "norm": params["stack"]["norm"],
    }  # fmt: skip
    if not config.tie_embeddings:
        out["head"] = {"kernel": params["head"]["kernel"][:, : config.vocabulary]}
    return out


def save_token_lm(
    path: Path, tokenizer: Path, start: int, end: int, model: TokensConfig, params: Params, row: int, dtype: str
) -> None:
    """Writes a folder of transformers (config.json, tokenizer.json, model.safetensors). Raises ConfigError, OSError."""
    config = own_config(model, row)
    record = record_from(config, start, end)
    write_tensors(path, tensors_from(decoder_params(params, model), config), dtype, metadata={"format": "pt"})
    shutil.copyfile(tokenizer, path / "tokenizer.json")
    (path / "config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
