"""Folders of transformers' Blt -> our parameters.

Rotary pairs stand interleaved there: features of queries and keys are put into our order, which no score depends on.
The patcher's ids are put into the flat family's order.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.config import BLTConfig, ConfigError, EntropyConfig, StackConfig
from bytelm.models.blt import VOCABULARY
from bytelm.models.build import Params
from bytelm.models.transformer import TABLE_ROWS

Weights = Mapping[str, NDArray]
MODEL_TYPE = "blt"
TRAINED_LENGTH = 8192
# Their ids in the order of a flat model: the bytes, then BOS, BOE, EOS, BPE.
_FLAT_ORDER = np.array([*range(4, VOCABULARY), 1, 0, 2, 3])


def _stack(c: dict[str, Any], window: int | None) -> StackConfig:
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"rotary scaling {kind!r} is not supported")
    if c.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act={c['hidden_act']!r}: only silu is supported")
    theta = rope["rope_theta"] if "rope_theta" in rope else c["rope_theta"]
    return StackConfig(
        layout=f"T{c['num_hidden_layers']}", d_model=c["hidden_size"], num_heads=c["num_attention_heads"],
        num_kv_heads=c.get("num_key_value_heads") or 0,
        d_mlp=c.get("intermediate_size") or int(8 * c["hidden_size"] / 3), window=window or 0,
        rope_theta=float(theta), norm_eps=c.get("rms_norm_eps", 1e-5),
    )  # fmt: skip


def config_from(r: dict[str, Any]) -> BLTConfig:
    """Our config of theirs. Raises ConfigError for what is not supported, KeyError for what is missing."""
    if not r.get("patch_in_forward", True) or r.get("patching_mode", "entropy") != "entropy":
        raise ConfigError(
            f"patch_in_forward={r.get('patch_in_forward')}, patching_mode={r.get('patching_mode')!r}: only patches by "
            "the entropy model of the folder are supported"
        )
    parts = [r[f"{part}_config"] for part in ("encoder", "decoder", "patcher", "global")]
    if not all(isinstance(c, dict) for c in parts) or r["patching_threshold"] is None or not r.get("patch_size", 1):
        raise ConfigError(
            "encoder, decoder, patcher and global config, patching_threshold and patch_size must be given"
        )
    for c in parts[:3]:
        if c.get("vocab_size", VOCABULARY) != VOCABULARY:
            raise ConfigError(f"vocab_size={c['vocab_size']}: only {VOCABULARY} is supported")
    encoder, decoder, patcher, main = parts
    window = r.get("local_attention_window_len", 512)
    return BLTConfig(
        encoder=_stack(encoder, window), main=_stack(main, 0), decoder=_stack(decoder, window),
        queries=r.get("cross_attn_k", 2), read_every_layer=decoder.get("cross_attn_all_layers", True), doubled=True,
        ngrams=tuple(r.get("encoder_hash_byte_group_size") or range(3, 9)),
        hash_functions=r.get("encoder_hash_byte_group_nb_functions", 1),
        hash_size=r.get("encoder_hash_byte_group_vocab", 500002),
        patcher=EntropyConfig(
            stack=_stack(patcher, patcher.get("sliding_window", 512)), tie_embeddings=False, symbols=VOCABULARY,
            threshold=float(r["patching_threshold"]), max_patch=r.get("max_patch_length") or 0,
        ),
    )  # fmt: skip


def is_dead(name: str, config: BLTConfig) -> bool:
    """Whether a tensor is there, but of no effect: attention of patches to bytes behind layers that are not the last,
    whose result each later layer replaces."""
    prefix = "model.local_encoder.cross_attn_layers."
    last = int(config.encoder.layout[1:]) - 1
    return name.startswith(prefix) and last > 0 and int(name.removeprefix(prefix).split(".")[0]) < last


def _linear(w: Weights, name: str, *split: int, out: bool = False) -> Params:
    turned = w[name].T
    return {"kernel": turned.reshape((*split, turned.shape[1]) if out else (turned.shape[0], *split))}


def _projections(w: Weights, prefix: str, c: StackConfig, rotary: bool) -> Params:
    width = c.head_width
    order = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)]) if rotary else np.arange(width)
    found = {"v": _linear(w, f"{prefix}v_proj.weight", c.kv_heads, width),
             "out": _linear(w, f"{prefix}o_proj.weight", c.num_heads, width, out=True)}  # fmt: skip
    for name, heads in (("q", c.num_heads), ("k", c.kv_heads)):
        found[name] = {"kernel": _linear(w, f"{prefix}{name}_proj.weight", heads, width)["kernel"][..., order]}
    return found


def _cross(w: Weights, prefix: str, c: StackConfig) -> Params:
    norms = {name: {"scale": w[f"{prefix}{name}.weight"]} for name in ("q_norm", "k_norm")}
    return {**_projections(w, prefix, c, rotary=False), **norms}


def _stacked(blocks: list[Any]) -> Any:
    if isinstance(blocks[0], dict):
        return {key: _stacked([block[key] for block in blocks]) for key in blocks[0]}
    return np.stack(blocks)


def _run(w: Weights, prefix: str, c: StackConfig) -> Params:
    def block(i: int) -> Params:
        name = f"{prefix}.layers.{i}."
        return {
            "mixer_norm": {"scale": w[f"{name}input_layernorm.weight"]},
            "attention": _projections(w, f"{name}self_attn.", c, rotary=True),
            "mlp_norm": {"scale": w[f"{name}post_attention_layernorm.weight"]},
            "mlp": {part: _linear(w, f"{name}mlp.{part}_proj.weight", -1) for part in ("gate", "up", "down")},
        }

    return {"run0": _stacked([block(i) for i in range(int(c.layout[1:]))])}


def _table(rows: NDArray) -> NDArray:
    """A table of the patcher in the flat family's order and size."""
    return np.pad(rows[_FLAT_ORDER], ((0, TABLE_ROWS - VOCABULARY), (0, 0)))


def params_from(w: Weights, c: BLTConfig) -> Params:
    """Our parameters of a state dict. Raises KeyError for a missing tensor."""
    encoder, decoder, d = "model.local_encoder", "model.local_decoder", c.encoder.d_model
    first = "model.local_encoder.cross_attn_layers."
    # One attention behind the last layer, or one behind each: the last one's result is what is left.
    every = f"{first}1.q_proj.weight" in w
    last = int(c.encoder.layout[1:]) - 1 if every else 0
    reads = int(c.decoder.layout[1:]) if c.read_every_layer else 1
    found = {
        "embed": {"table": w[f"{encoder}.embed_tokens.weight"]},
        "hash_embed": {"table": w["model.encoder_hash_tok_embedding.weight"]},
        "encoder": _run(w, encoder, c.encoder),
        "pool": {"split": _linear(w, f"{encoder}.patch_embedding_projection.weight", c.queries, d),
                 "cross": _cross(w, f"{first}{last}.", c.encoder)},
        "main": _run(w, "model.global_transformer", c.main),
        "part": _linear(w, f"{decoder}.patch_embedding_projection.weight", c.queries, d),
        "read": _stacked([_cross(w, f"{decoder}.cross_attn_layers.{i}.", c.decoder) for i in range(reads)]),
        "decoder": {**_run(w, decoder, c.decoder), "norm": {"scale": w[f"{decoder}.norm.weight"]}},
        "head": _linear(w, "lm_head.weight", -1),
        "patcher": {
            "embed": {"table": _table(w["model.patcher.embed_tokens.weight"])},
            "stack": {**_run(w, "model.patcher", c.patcher.stack),
                      "norm": {"scale": w["model.patcher.norm.weight"]}},
            "head": {"kernel": _table(w["model.patcher.lm_head.weight"]).T},
        },
    }  # fmt: skip
    if c.queries * d != c.main.d_model:
        found["join"] = _linear(w, "model.global_transformer.token_embedding_projection.weight", c.queries, d, out=True)
    return found
