"""Published weights and configs of HAT, SpaceByte, its MegaByte, and BLT (`blt.py`) <-> ours.

HAT: the names of its released checkpoints (config.json with model_type hierarchical_autoregressive_transformer).
SpaceByte and MegaByte: the state dict of their authors' code. Rotary pairs stand interleaved there: features of queries
and keys are put into our order, which no score depends on.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.config import BLTConfig, ConfigError, HATConfig, MegaByteConfig, SpaceByteConfig, StackConfig
from bytelm.interop import blt
from bytelm.models.build import Params

Weights = Mapping[str, NDArray]
HierarchicalConfig = HATConfig | SpaceByteConfig | MegaByteConfig | BLTConfig
MODEL_TYPE = "hierarchical_autoregressive_transformer"
# In the published code, but of no effect: an attention over one key has weight 1 whatever its query.
DEAD = ("query_norm.weight", "cross_attention.q_proj.weight", "cross_attention.k_proj.weight",
        "cross_attention.norm_query.weight", "cross_attention.norm_key.weight")  # fmt: skip


def is_hierarchical(record: dict[str, Any]) -> bool:
    """Whether a config.json, or the config of a parity case, is of HAT, SpaceByte, MegaByte or BLT."""
    inner = record.get("config", record)
    known = record.get("model_type") in (MODEL_TYPE, blt.MODEL_TYPE) or record.get("model") in ("SpaceByte", "MegaByte")
    return known or (isinstance(inner, dict) and "encoder_config" in inner and "backbone_config" in inner)


def config_from(record: dict[str, Any], where: str) -> HierarchicalConfig:
    """Our config of a published one. Raises ConfigError naming what is missing or not supported."""
    inner = record.get("config", record)
    try:
        if record.get("model_type") == blt.MODEL_TYPE:
            return blt.config_from(record)
        if "encoder_config" in inner:
            return _hat_config(inner)
        return _megabyte_config(inner) if record.get("model") == "MegaByte" else _spacebyte_config(inner)
    except KeyError as e:
        raise ConfigError(f"{where}: has no {e.args[0]}") from None
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{where}: {e}") from None


def trained_length(record: dict[str, Any], config: HierarchicalConfig) -> int:
    """Bytes per row that a published model can read. Raises ConfigError for a length that is none."""
    if isinstance(config, SpaceByteConfig | MegaByteConfig):
        return config.longest_row or 8192
    if isinstance(config, BLTConfig):
        return blt.TRAINED_LENGTH
    longest = record.get("config", record).get("max_position_embeddings") or 8192
    if type(longest) is not int or longest < 1:
        raise ConfigError(f"max_position_embeddings={longest!r}: must be a whole number above 0")
    return longest


def params_from(weights: Weights, config: HierarchicalConfig) -> Params:
    """Our parameters of a state dict. Raises KeyError for a missing tensor."""
    if isinstance(config, BLTConfig):
        return blt.params_from(weights, config)
    if isinstance(config, HATConfig):
        return _hat_params(weights, config)
    if isinstance(config, SpaceByteConfig):
        return _spacebyte_params(weights, config)
    return _megabyte_params(weights, config)


def used_names(weights: Weights, config: HierarchicalConfig) -> set[str]:
    """The tensors that our parameters are made of, and those that are known to be of no effect."""

    class Recording(dict):
        def __getitem__(self, name):
            seen.add(name)
            return weights[name]

        def __contains__(self, name):
            return name in weights

    seen: set[str] = set()
    params_from(Recording(), config)
    if isinstance(config, BLTConfig):
        return seen | {name for name in weights if blt.is_dead(name, config)}
    dead = {name for name in weights if name.endswith(DEAD)}
    if isinstance(config, HATConfig) and not config.guide_every_layer:  # norms of guides that later layers do not have
        dead |= {f"decoder.decoder_layers.{i}.kv_norm.weight" for i in _layers(config.decoder) if i} & set(weights)
    return seen | dead


# --- HAT ---


def _hat_config(r: dict[str, Any]) -> HATConfig:
    def stack(part: str) -> StackConfig:
        c = {**{k: r[k] for k in ("rms_norm_eps", "rope_theta", "rope_scaling") if k in r}, **r[part]}
        if c.get("mlp_bias"):
            raise ConfigError(f"{part}.mlp_bias: biases are not supported")
        if c.get("is_neox_style") is False:
            raise ConfigError(f"{part}.is_neox_style=false: interleaved rotary pairs are not supported")
        scaling = c.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise ConfigError(f"{part}.rope_scaling of type {kind!r} is not known (default, llama3)")
        stretch = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        window = c.get("sliding_window", r.get("sliding_window") if part != "backbone_config" else None)
        return StackConfig(
            layout=f"T{c['num_hidden_layers']}", d_model=c["hidden_size"], num_heads=c["num_attention_heads"],
            num_kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"], head_dim=c.get("head_dim") or 0,
            d_mlp=c["intermediate_size"], window=window or 0, rope_theta=float(c.get("rope_theta") or 1e4),
            rope_stretch=tuple(float(scaling[k]) for k in stretch) if kind == "llama3" else (),
            norm_eps=c.get("rms_norm_eps") or 1e-5, qk_norm=_qk_norm(c),
        )  # fmt: skip

    pool, guide = (r[p]["cross_attention_config"] for p in ("encoder_config", "decoder_config"))
    encoder, backbone, decoder = (stack(f"{part}_config") for part in ("encoder", "backbone", "decoder"))
    for name, c, width in (("encoder", pool, backbone.d_model), ("decoder", guide, decoder.d_model)):
        where = f"{name}_config.cross_attention_config"
        if c.get("word_window_size", 1) != 1:
            raise ConfigError(f"{where}.word_window_size={c['word_window_size']}: only 1 is supported")
        if c.get("hidden_size", width) != width:
            raise ConfigError(f"{where}.hidden_size={c['hidden_size']}: only {width} is supported")
    end = r.get("eos_token_id") or 192
    if end != 192:
        raise ConfigError(f"eos_token_id={end}: only 192 is supported")
    special = r.get("special_token_dict") or {}
    start = special.get("<|begin_of_text|>", special.get("<|eot_id|>", 192))
    return HATConfig(
        encoder=encoder, backbone=backbone, decoder=decoder,
        pool_heads=pool["num_attention_heads"], pool_kv_heads=pool.get("attention_num_kv_heads") or 0,
        pool_norm=_qk_norm(pool), pool_theta=encoder.rope_theta, pool_stretch=encoder.rope_stretch,
        guide_heads=guide["num_attention_heads"], guide_kv_heads=guide.get("attention_num_kv_heads") or 0,
        guide_every_layer=r["decoder_config"].get("cross_attn_every_layer", True),
        max_word=r.get("max_word_size") or 100, start=start,
    )  # fmt: skip


def _qk_norm(c: dict[str, Any]) -> Any:
    return "none" if not c.get("key_query_norm") else "head" if c.get("key_query_norm_per_head") else "all"


def _linear(w: Weights, name: str, *split: int, out: bool = False) -> Params:
    """A weight [out, in] as a kernel [in, *split], or with `out` [*split, out]."""
    turned = w[name].T
    shape = (*split, turned.shape[1]) if out else (turned.shape[0], *split)
    return {"kernel": turned.reshape(shape)}


def _heads(w: Weights, prefix: str, heads: int, kv: int, width: int, norm: str) -> Params:
    """The four projections of an attention, and its norms."""
    found = {
        "q": _linear(w, f"{prefix}q_proj.weight", heads, width), "k": _linear(w, f"{prefix}k_proj.weight", kv, width),
        "v": _linear(w, f"{prefix}v_proj.weight", kv, width),
        "out": _linear(w, f"{prefix}o_proj.weight", heads, width, out=True),
    }  # fmt: skip
    if norm != "none":
        found["q_norm"] = {"norm": {"scale": w[f"{prefix}norm_query.weight"]}}
        found["k_norm"] = {"norm": {"scale": w[f"{prefix}norm_key.weight"]}}
    return found


def _llama_block(w: Weights, prefix: str, c: StackConfig) -> Params:
    return {
        "mixer_norm": {"scale": w[f"{prefix}input_layernorm.weight"]},
        "attention": _heads(w, f"{prefix}self_attn.", c.num_heads, c.kv_heads, c.head_width, c.qk_norm),
        "mlp_norm": {"scale": w[f"{prefix}post_attention_layernorm.weight"]},
        "mlp": {name: _linear(w, f"{prefix}mlp.{name}_proj.weight", -1) for name in ("gate", "up", "down")},
    }


def _stacked(blocks: list[Any]) -> Any:
    if isinstance(blocks[0], dict):
        return {key: _stacked([block[key] for block in blocks]) for key in blocks[0]}
    return np.stack(blocks)


def _layers(c: StackConfig) -> range:
    return range(int(c.layout[1:]))


def _hat_params(w: Weights, c: HATConfig) -> Params:
    kv = c.pool_kv_heads or c.pool_heads
    pool = _heads(w, "encoder_connector.cross_attention_encoder_connector.", c.pool_heads, kv,
                  c.backbone.d_model // c.pool_heads, c.pool_norm)  # fmt: skip
    width = c.decoder.d_model // c.guide_heads
    guides = [
        {
            "norm": {"scale": w[f"{prefix}kv_norm.weight"]},
            "v": _linear(w, f"{prefix}cross_attention.v_proj.weight", c.guide_kv_heads or c.guide_heads, width),
            "out": _linear(w, f"{prefix}cross_attention.o_proj.weight", c.guide_heads, width, out=True),
        }
        for prefix in (f"decoder.decoder_layers.{i}." for i in _layers(c.decoder) if i == 0 or c.guide_every_layer)
    ]

    def run(name: str, config: StackConfig) -> Params:
        return {"run0": _stacked([_llama_block(w, name.format(i), config) for i in _layers(config)])}

    return {
        "embed": {"table": w["encoder.embedding_layer.weight"]},
        "encoder": run("encoder.layers.{}.", c.encoder),
        "pool": {"query": w["encoder_connector.latent_query"].reshape(-1), **pool},
        "backbone": run("backbone.layers.{}.", c.backbone),
        "first_word": w["decoder_connector.first_word_embedding"].reshape(-1),
        "guide": {"layer": _stacked(guides)},
        "decoder": {**run("decoder.decoder_layers.{}.llama_layer.", c.decoder),
                    "norm": {"scale": w["layer_norm.weight"]}},
        "head": _linear(w, "lm_head.weight", -1),
    }  # fmt: skip


# --- SpaceByte and its MegaByte ---


def _slagle_stack(c: dict[str, Any], layers: int, d: int, window: int) -> StackConfig:
    wrong = [f"{k}={c[k]!r}" for k, v in (("qk_layer_norm", True), ("nonlinear", "ReLU"), ("layer_norm", "LayerNorm"),
             ("rope", True), ("attention_groups", None), ("sparse_attention", None), ("tie_embedding", False),
             ("vocab_size", 256)) if c.get(k) != v]  # fmt: skip
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: not supported")
    heads = d // c["d_key"]
    return StackConfig(layout=f"T{layers}", d_model=d, num_heads=heads, head_dim=c["d_key"], d_mlp=c["d_ff_mult"] * d,
                       window=window, norm="layer", qk_norm="head", mlp="relu")  # fmt: skip


def _spacebyte_config(c: dict[str, Any]) -> SpaceByteConfig:
    local = c["local_attention_window"] + 1  # the code's window does not count the byte itself
    before = c["n_initial_layers"]
    learned = c.get("position_encoding", True)
    return SpaceByteConfig(
        initial=_slagle_stack(c, before, c["d_local"], local), main=_slagle_stack(c, c["n_layers"], c["d_model"], 0),
        final=_slagle_stack(c, c["n_local_layers"] - before, c["d_local"], local),
        patches="periodic" if c["patch_method"] == "periodic" else "spacelike",
        period=-(-c["context_size"] // c["global_context_size"]),
        positions=c["context_size"] if learned else 0, slots=c["global_context_size"] if learned else 0,
    )  # fmt: skip


def _megabyte_config(c: dict[str, Any]) -> MegaByteConfig:
    return MegaByteConfig(
        patch=c["patch_size"], main=_slagle_stack(c, c["n_layers"], c["d_model"], 0),
        local=_slagle_stack(c, c["n_local_layers"], c["d_local"], 0),
        positions=c["context_size"] if c.get("position_encoding", True) else 0,
    )  # fmt: skip


def _slagle_block(w: Weights, prefix: str, c: StackConfig) -> Params:
    width = c.head_width
    order = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])  # pairs (0, 1) become (0, width / 2)
    joint = w[f"{prefix}attention.QKV_linear.weight"].T.reshape(c.d_model, 3, c.num_heads, width)
    return {
        "mixer_norm": {"scale": w[f"{prefix}attention.layer_norm.scale"]},
        "attention": {
            "q": {"kernel": joint[:, 0][..., order]}, "k": {"kernel": joint[:, 1][..., order]},
            "v": {"kernel": joint[:, 2]},
            "out": _linear(w, f"{prefix}attention.linear.weight", c.num_heads, width, out=True),
            "q_norm": {"norm": {"scale": w[f"{prefix}attention.Q_layer_norm.scale"][order]}},
            "k_norm": {"norm": {"scale": w[f"{prefix}attention.K_layer_norm.scale"][order]}},
        },
        "mlp_norm": {"scale": w[f"{prefix}feedforward.layer_norm.scale"]},
        "mlp": {"up": _linear(w, f"{prefix}feedforward.linear_1.weight", -1),
                "down": _linear(w, f"{prefix}feedforward.linear_2.weight", -1)},
    }  # fmt: skip


def _slagle_run(w: Weights, name: str, c: StackConfig) -> Params:
    return {"run0": _stacked([_slagle_block(w, f"{name}.{i}.", c) for i in _layers(c)])}


def _slagle_end(w: Weights) -> tuple[Params, Params]:
    """Closing norm and head."""
    return {"scale": w["logits.layer_norm.scale"]}, _linear(w, "logits.logits_linear.weight", -1)


def _spacebyte_params(w: Weights, c: SpaceByteConfig) -> Params:
    norm, head = _slagle_end(w)
    found = {
        "embed": {"table": w["token_embedding.weight"]}, "initial": _slagle_run(w, "initial_blocks", c.initial),
        "main": _slagle_run(w, "global_blocks", c.main), "head": head,
        "final": {**_slagle_run(w, "final_blocks", c.final), "norm": norm},
    }  # fmt: skip
    if c.positions:
        found["positions"] = {"table": w["local_position_encoding"]}
    if c.slots:
        found["ranks"] = {"table": w["global_position_encoding"]}
    return found


def _megabyte_params(w: Weights, c: MegaByteConfig) -> Params:
    norm, head = _slagle_end(w)
    found = {
        "embed": {"table": w["global_token_embedding.weight"]}, "first_patch": w["global_pad"],
        "main": _slagle_run(w, "global_blocks", c.main),
        "coarse": {**_linear(w, "global_to_local.weight", -1), "bias": w["global_to_local.bias"]},
        "local_embed": {"table": w["local_token_embedding.weight"]}, "first_byte": w["local_pad"],
        "offsets": w["local_position_encoding"], "head": head,
        "local": {**_slagle_run(w, "local_blocks", c.local), "norm": norm},
    }  # fmt: skip
    if c.positions:
        found["positions"] = {"table": w["global_position_encoding"]}
    return found
