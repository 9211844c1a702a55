"""The blocks of a tokenized Llama, Mistral, SmolLM or Qwen 3 as the backbone of a HAT: what they learned of sequences
of tokens is a start for sequences of words (the HAT report's conversion)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from numpy.typing import NDArray

from bytelm.checkpoint import CheckpointError
from bytelm.config import ConfigError, StackConfig
from bytelm.interop import token_lm
from bytelm.interop.gguf_file import open_gguf
from bytelm.interop.published import open_tensors, read_record, weights_file
from bytelm.models.build import Params
from bytelm.models.token_lm import TokenLMConfig, token_structure


@dataclass(frozen=True)
class Blocks:
    """The blocks of a tokenized model, and what it has around them: its embeddings, their root mean square, and the
    scale of its last norm."""

    params: Params
    embeddings: NDArray[np.float32]
    embedding_size: float
    norm: NDArray[np.float32]


def open_blocks(path: Path) -> tuple[StackConfig, Callable[[], Blocks]]:
    """The blocks of a tokenized model (a folder of transformers, or a .gguf file) as a stack, and a function that reads
    them in float32. Raises CheckpointError or ConfigError."""
    if path.suffix == ".gguf":
        (record, tensors, _), file = open_gguf(path), path
    else:
        record = read_record(path)
        if not token_lm.is_token_lm(record):
            raise CheckpointError(f"holds no tokenized model (config.json of {', '.join(token_lm.KINDS)})")
        file = weights_file(path)
        tensors = open_tensors(file)
    config = token_lm.config_from(record, str(path))
    stack = stack_config(config, str(path))

    def read() -> Blocks:
        params = token_lm.params_from(tensors, config, token_structure(config)[1], str(file))
        embeddings = np.asarray(params["embed"]["table"], np.float32)
        size = float(np.sqrt(np.mean(np.square(embeddings))))
        norm = np.asarray(params["norm"]["scale"], np.float32)
        return Blocks(jax.tree.map(np.asarray, stack_params(params, stack)), embeddings, size, norm)

    return stack, read


def stack_config(c: TokenLMConfig, where: str) -> StackConfig:
    """The blocks of a token decoder as a stack of ours. Raises ConfigError for what a stack does not have."""
    s = c.scaling
    missing = {
        "learned positions or no gate (GPT-2)": not c.rope_theta or not c.gated, "LayerNorm": c.norm != "rms",
        "biases": c.qkv_bias or c.out_bias or c.mlp_bias, f"the activation {c.activation}": c.activation != "silu",
        "windows of some layers": len(set(c.layer_windows())) > 1,
        "linear rotary scaling": s is not None and s.kind != "llama3",
    }  # fmt: skip
    found = [what for what, has in missing.items() if has]
    if found:
        raise ConfigError(f"{where}: its blocks have {', '.join(found)}, which a backbone of ours does not")
    return StackConfig(
        layout=f"T{c.layers}", d_model=c.d_model, num_heads=c.num_heads, num_kv_heads=c.kv_heads, head_dim=c.head_dim,
        d_mlp=c.d_mlp, window=c.layer_windows()[0], rope_theta=c.rope_theta,
        rope_stretch=(s.factor, s.low, s.high, float(s.original)) if s is not None else (), norm_eps=c.norm_eps,
        qk_norm="head" if c.qk_norm else "none",
    )  # fmt: skip


# A stack's name of a block's parameter -> ours in a token decoder.
IN_STACK = {
    "mixer_norm/scale": "attention_norm/scale", "mlp_norm/scale": "mlp_norm/scale",
    "attention/q_norm/norm/scale": "q_norm/scale", "attention/k_norm/norm/scale": "k_norm/scale",
    **{f"attention/{n}/kernel": f"{n}/kernel" for n in ("q", "k", "v", "out")},
    **{f"mlp/{n}/kernel": f"{n}/kernel" for n in ("gate", "up", "down")},
}  # fmt: skip


def stack_params(params: Params, config: StackConfig) -> Params:
    """The parameters of a stack (without a closing norm) from those of a token decoder."""
    blocks, run = params["blocks"], {}
    for there, here in IN_STACK.items():
        if "_norm/norm" in there and config.qk_norm == "none":
            continue
        *folders, last = there.split("/")
        place = run
        for folder in folders:
            place = place.setdefault(folder, {})
        name, kind = here.split("/")
        place[last] = blocks[name][kind]
    return {"run0": run}
