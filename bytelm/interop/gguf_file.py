"""GGUF files (llama.cpp) of token decoders: config, tensors and tokenizer in transformers' terms. Quantised tensors are
turned to float32 as they are read. Needs the package gguf (extra `tokenizers`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.checkpoint import CheckpointError
from bytelm.config import ConfigError
from bytelm.patterns import CL100K, QWEN2

_NAMES = {
    "attn_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight", "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.weight": "self_attn.k_proj.weight", "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.weight": "self_attn.v_proj.weight", "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight", "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight", "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight", "ffn_down.weight": "mlp.down_proj.weight",
}  # fmt: skip
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight"}  # fmt: skip
_SKIPPED = ("rope_freqs.weight",)  # the stretched frequencies of Llama 3, which its keys say too
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def _split(pattern: str) -> dict[str, Any]:
    parts = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, _BYTES]
    return {"type": "Sequence", "pretokenizers": parts}


PRETOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _GPT2,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2]},
    "llama-bpe": _split(CL100K),
    "qwen2": _split(QWEN2),
}  # by tokenizer.ggml.pre


class GGUFTensors(Mapping[str, NDArray]):
    """Tensors under transformers' names, float32."""

    def __init__(self, reader: Any, record: dict[str, Any]):
        self._tensors: dict[str, Any] = {}
        self._record = record
        for tensor in reader.tensors:
            if tensor.name in _SKIPPED:
                continue
            name = _TOP.get(tensor.name)
            if tensor.name.startswith("blk."):
                _, layer, rest = tensor.name.split(".", 2)
                name = f"model.layers.{layer}.{_NAMES[rest]}" if rest in _NAMES else None
            self._tensors[name or tensor.name] = tensor

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self):
        return iter(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> NDArray:
        import gguf

        tensor = self._tensors[name]
        try:
            value = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        except (NotImplementedError, ValueError, KeyError) as e:
            raise CheckpointError(f"{name} is stored as {tensor.tensor_type}, which cannot be read: {e}") from None
        value = value.reshape(tuple(int(n) for n in reversed(tensor.shape)))
        heads = {"q_proj.weight": "num_attention_heads", "k_proj.weight": "num_key_value_heads"}
        key = heads.get(".".join(name.split(".")[-2:]))
        if key and self._record["model_type"] == "llama":  # stored for pairs of neighbouring features
            value = value.reshape(self._record[key], -1, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        return value


def open_gguf(path: Path) -> tuple[dict[str, Any], GGUFTensors, dict[str, Any]]:
    """(config.json, tensors, tokenizer) as transformers would have them. Raises CheckpointError, ConfigError."""
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            f"{path}: reading GGUF files needs the package gguf: pip install 'bytelm[tokenizers]'"
        ) from None
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as e:  # numpy raises many kinds for a file that is cut off or is something else
        raise CheckpointError(f"{path}: cannot be read as GGUF: {e}") from None
    kind = fields.get("general.architecture")
    if kind not in ("llama", "qwen2", "qwen3", "mistral"):
        raise ConfigError(f"{path}: models of architecture {kind!r} are not read from GGUF (llama, qwen2, qwen3 are)")

    def get(name: str, default: Any = None) -> Any:
        found = fields.get(f"{kind}.{name}", default)
        if found is None:
            raise ConfigError(f"{path}: has no {kind}.{name}")
        return found

    if fields.get(f"{kind}.rope.scaling.type", "none") not in ("none", ""):
        raise ConfigError(f"{path}: rotary scaling {fields[f'{kind}.rope.scaling.type']!r} is not read from GGUF")
    if any(t.name in _SKIPPED for t in reader.tensors):
        raise ConfigError(f"{path}: holds stretched rotary frequencies (Llama 3.1), which are not read from GGUF")
    tokens = fields.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ConfigError(f"{path}: has no tokenizer")
    heads = get("attention.head_count")
    record = {
        "model_type": kind, "vocab_size": len(tokens), "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count"), "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads), "intermediate_size": get("feed_forward_length"),
        "head_dim": get("attention.key_length", get("embedding_length") // heads),
        "max_position_embeddings": get("context_length"), "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 1e4), "tie_word_embeddings": "output.weight" not in
        {t.name for t in reader.tensors}, "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
    }  # fmt: skip
    record["chat_template"] = fields.get("tokenizer.chat_template", "")
    if fields.get("tokenizer.ggml.add_bos_token", True):
        record["bos_token_id"] = fields.get("tokenizer.ggml.bos_token_id")
    else:  # texts follow one another, with a symbol between them
        record["bos_token_id"] = tokens.index("<|endoftext|>") if "<|endoftext|>" in tokens else record["eos_token_id"]
    return record, GGUFTensors(reader, record), _tokenizer(fields, path)


def _tokenizer(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    if fields.get("tokenizer.ggml.model") != "gpt2":
        raise ConfigError(f"{path}: its tokenizer is of kind {fields.get('tokenizer.ggml.model')!r}; byte-level BPE "
                          "(gpt2) is read from GGUF")  # fmt: skip
    pre = fields.get("tokenizer.ggml.pre", "")
    if pre not in PRETOKENIZERS:
        raise ConfigError(f"{path}: its pre-tokenizer {pre!r} is not known ({', '.join(PRETOKENIZERS)})")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.token_type", [])
    special = [i for i, kind in enumerate(kinds) if kind in (2, 3, 4)]  # unknown, control, defined by a user
    return {
        "added_tokens": [{"id": i, "content": tokens[i], "special": kinds[i] != 4} for i in special],
        "pre_tokenizer": PRETOKENIZERS[pre],
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "ignore_merges": pre == "llama-bpe",
                  "merges": fields.get("tokenizer.ggml.merges", [])},
    }  # fmt: skip
