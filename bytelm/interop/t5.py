"""ByT5's and MrT5's published weights and configs <-> ours (names and shapes of transformers' T5 and of jkallini/mrt5).

Linear weights are [out, in] there. A head is its own matrix wherever the file has one, and outputs are scaled only
where the config says so: neither follows from the other (transformers 5 writes tie_word_embeddings true beside a head).
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bytelm.config import ConfigError, DeletionConfig, T5Config
from bytelm.models.build import Params

Weights = Mapping[str, NDArray]
Name = tuple[tuple[str, ...], str, str]  # our path, the name there, how the tensor is laid out there
TRAINED_LENGTH = 1024  # bytes of input of the published models
GATES: dict[str, Literal["learned", "random", "fixed"]] = {
    "scaled_sigmoid": "learned",
    "random": "random",
    "fixed": "fixed",
}
# The same tensor under other names, and what some old files hold beside the model.
_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_STRAY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def is_t5(record: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of these models'."""
    return record.get("model_type") in ("t5", "mrt5") and "d_kv" in record


def config_from(record: Mapping[str, Any], where: str, *, head: bool = True) -> T5Config:
    """Our config for a config.json; `head`: whether the file of weights has an output matrix of its own.

    Raises ConfigError naming what is missing or not supported.
    """

    def need(name: str, default: Any = None) -> int:
        value = record.get(name) if record.get(name) is not None else default
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{where}: {name} is {value!r}, expected a whole number")
        return value

    def number(name: str, default: float) -> float:
        value = record.get(name) if record.get(name) is not None else default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{where}: {name} is {value!r}, expected a number")
        return float(value)

    feed = record.get("feed_forward_proj", "relu")
    if feed not in ("gated-gelu", "gated-gelu_new") or record.get("dense_act_fn", "gelu_new") != "gelu_new":
        raise ConfigError(
            f"{where}: feed_forward_proj {feed!r}, dense_act_fn {record.get('dense_act_fn')!r}: only the gated GELU "
            "(tanh approximation) of T5 1.1 and ByT5 is supported"
        )
    if record.get("has_absolute_position_embeddings"):
        raise ConfigError(
            f"{where}: has_absolute_position_embeddings: models with absolute positions are not supported"
        )
    for name, ours in (("pad_token_id", 0), ("eos_token_id", 1), ("decoder_start_token_id", 0)):
        if record.get(name, ours) not in (ours, None):
            raise ConfigError(f"{where}: {name} is {record[name]!r}; ByT5's ids have it at {ours}")
    if need("vocab_size") < 259:
        raise ConfigError(f"{where}: vocab_size {record.get('vocab_size')}: a byte model has at least 259")
    tied = bool(record.get("tie_word_embeddings", True))
    return T5Config(
        d_model=need("d_model"), num_heads=need("num_heads"), head_dim=need("d_kv"), d_mlp=need("d_ff"),
        encoder_layers=need("num_layers"), decoder_layers=need("num_decoder_layers", record.get("num_layers")),
        buckets=need("relative_attention_num_buckets", 32),
        max_distance=need("relative_attention_max_distance", 128),
        dropout=number("dropout_rate", 0.1), softmax_one=bool(record.get("use_softmax1", False)),
        deletion=_deletion(record, where, need, number), tie_embeddings=not head,
        scale_logits=bool(record.get("scale_decoder_outputs", tied)), vocabulary=need("vocab_size"),
        norm_eps=number("layer_norm_epsilon", 1e-6),
    )  # fmt: skip


def _deletion(
    record: Mapping[str, Any], where: str, need: Callable[..., int], number: Callable[[str, float], float]
) -> DeletionConfig:
    kind = record.get("deletion_type")
    if kind is not None:
        if kind not in GATES:
            raise ConfigError(f"{where}: deletion_type {kind!r} is not supported; known: {', '.join(GATES)}")
        scale = number("sigmoid_mask_scale", -10.0)
        rates = {"random": "random_deletion_probability", "fixed": "fixed_deletion_amount"}
        return DeletionConfig(
            kind=GATES[kind], layer=need("delete_gate_layer", 2), scale=scale,
            threshold=number("deletion_threshold", scale / 2),
            gate_norm=bool(record.get("gate_layer_norm", True)), noise=bool(record.get("use_gumbel_noise", False)),
            rate=number(rates.get(kind, ""), 0.5),
        )  # fmt: skip
    if "boundary_predictor_layer" in record:
        if record.get("temperature", 0.5) != 0.5:
            raise ConfigError(f"{where}: temperature {record['temperature']}: the boundary predictor has 0.5 here")
        return DeletionConfig(
            kind="boundary", layer=need("boundary_predictor_layer"), rate=1 - number("prior", 0.5),
            released=not record.get("bytelm_exact_padding", False),
        )  # fmt: skip
    if "downsampling_layer" in record:
        return DeletionConfig(
            kind="convolution", layer=need("downsampling_layer"), rate=1 - 1 / max(need("downsampling_rate"), 1)
        )
    return DeletionConfig()


def reference_config(config: T5Config) -> dict[str, Any]:
    """The config.json of a model. One with neither softmax1 nor anything that deletes is a plain `t5`, which
    transformers loads; the others are for their authors' code, and transformers refuses their model_type."""
    d = config.deletion
    record: dict[str, Any] = {
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True,
        "d_model": config.d_model, "d_kv": config.head_dim, "d_ff": config.d_mlp, "num_layers": config.encoder_layers,
        "num_decoder_layers": config.decoder_layers, "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.buckets, "relative_attention_max_distance": config.max_distance,
        "dropout_rate": config.dropout, "layer_norm_epsilon": config.norm_eps, "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new", "is_gated_act": True, "vocab_size": config.vocabulary, "pad_token_id": 0,
        "eos_token_id": 1, "decoder_start_token_id": 0, "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.scale_logits, "tokenizer_class": "ByT5Tokenizer", "use_cache": True,
    }  # fmt: skip
    if d.kind == "none" and not config.softmax_one:
        return record
    record |= {"model_type": "mrt5", "architectures": ["MrT5ForConditionalGeneration"],
               "use_softmax1": config.softmax_one, "has_absolute_position_embeddings": False}  # fmt: skip
    if d.gated:
        kind = next(theirs for theirs, ours in GATES.items() if ours == d.kind)
        record |= {"deletion_type": kind, "delete_gate_layer": d.layer, "sigmoid_mask_scale": d.scale,
                   "deletion_threshold": d.threshold, "gate_layer_norm": d.gate_norm, "use_gumbel_noise": d.noise,
                   "random_deletion_probability": d.rate, "fixed_deletion_amount": d.rate}  # fmt: skip
    elif d.kind == "boundary":
        record |= {"boundary_predictor_layer": d.layer, "boundary_predictor_type": "gumbel",
                   "prior": round(1 - d.rate, 6), "temperature": 0.5}  # fmt: skip
        record |= {} if d.released else {"bytelm_exact_padding": True}
    elif d.kind == "convolution":
        record |= {"downsampling_layer": d.layer, "downsampling_rate": d.stride}
    return record


def _attention_names(config: T5Config, prefix: str) -> list[Name]:
    return [
        ((x, "kernel"), f"{prefix}.{name}.weight", kind)
        for x, name, kind in (("q", "q", "heads"), ("k", "k", "heads"), ("v", "v", "heads"), ("out", "o", "out"))
    ]


def _block_names(config: T5Config, side: str) -> list[Name]:
    """(our path in a block, name behind `SIDE.block.N.`, how the tensor is laid out there)."""
    decoder = side == "decoder"
    names: list[Name] = [(("attention_norm", "scale"), "layer.0.layer_norm.weight", "same")]
    names += [(("attention", *path), n, k) for path, n, k in _attention_names(config, "layer.0.SelfAttention")]
    if decoder:
        names.append((("cross_norm", "scale"), "layer.1.layer_norm.weight", "same"))
        names += [(("cross_attention", *p), n, k) for p, n, k in _attention_names(config, "layer.1.EncDecAttention")]
    last = 2 if decoder else 1
    names.append((("mlp_norm", "scale"), f"layer.{last}.layer_norm.weight", "same"))
    dense = f"layer.{last}.DenseReluDense"
    names += [
        (("mlp", ours, "kernel"), f"{dense}.{theirs}.weight", "turned")
        for ours, theirs in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo"))
    ]
    return names


def _single_names(config: T5Config) -> list[Name]:
    """The same for tensors outside the blocks."""
    d = config.deletion
    names: list[Name] = [(("embed", "table"), "shared.weight", "same")]
    for side in ("encoder", "decoder"):
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        names += [((side, "bias", "table"), bias, "same"),
                  ((side, "norm", "scale"), f"{side}.final_layer_norm.weight", "same")]  # fmt: skip
    if not config.tie_embeddings:
        names.append((("head", "kernel"), "lm_head.weight", "turned"))
    block = f"encoder.block.{d.layer}."
    if d.kind == "learned":
        gate = block + "delete_gate."
        names += [(("encoder", "delete_gate", "kernel"), gate + "feed_forward.weight", "row"),
                  (("encoder", "delete_gate", "bias"), gate + "feed_forward.bias", "number")]  # fmt: skip
        if d.gate_norm:
            names.append((("encoder", "delete_gate", "norm", "scale"), gate + "layer_norm.weight", "same"))
    elif d.kind == "boundary":
        mlp = block + "boundary_predictor.boundary_predictor."
        own = ("encoder", "boundary")
        names += [((*own, "norm", "scale"), block + "down_ln.weight", "same"),
                  ((*own, "hidden"), mlp + "0.weight", "turned"), ((*own, "hidden_bias"), mlp + "0.bias", "same"),
                  ((*own, "out"), mlp + "2.weight", "turned"),
                  ((*own, "out_bias"), mlp + "2.bias", "same")]  # fmt: skip
    elif d.kind == "convolution":
        conv, own = block + "downsampling_module.conv.", ("encoder", "pool")
        names += [((*own, "norm", "scale"), block + "down_ln.weight", "same"),
                  ((*own, "kernel"), conv + "weight", "taps"), ((*own, "bias"), conv + "bias", "same")]  # fmt: skip
    return names


def _ours(x: Any, kind: str, config: T5Config) -> Any:
    h, k = config.num_heads, config.head_dim
    return {
        "same": lambda: x, "turned": lambda: x.T, "row": lambda: x[0], "number": lambda: x[0],
        "heads": lambda: x.T.reshape(-1, h, k), "out": lambda: x.T.reshape(h, k, -1),
        "taps": lambda: x.transpose(2, 1, 0),
    }[kind]()  # fmt: skip


def _theirs(x: Any, kind: str, config: T5Config) -> Any:
    inner = config.num_heads * config.head_dim
    return {
        "same": lambda: x, "turned": lambda: x.T, "row": lambda: x[None], "number": lambda: x[None],
        "heads": lambda: x.reshape(-1, inner).T, "out": lambda: x.reshape(inner, -1).T,
        "taps": lambda: x.transpose(2, 1, 0),
    }[kind]()  # fmt: skip


def _put(tree: Params, path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _get(tree: Params, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def params_from(weights: Weights, config: T5Config) -> Params:
    """Our parameters from a state dict. Raises KeyError for a missing tensor, ValueError for a misshapen one."""
    out: Params = {}
    for path, name, kind in _single_names(config):
        _put(out, path, _ours(weights[name], kind, config))
    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        for path, name, kind in _block_names(config, side):
            blocks = [_ours(weights[f"{side}.block.{i}.{name}"], kind, config) for i in range(layers)]
            _put(out, (side, "blocks", *path), np.stack(blocks))
    return out


def state_dict(params: Params, config: T5Config) -> dict[str, Any]:
    """A state dict in transformers' names and shapes from our parameters (or anything with their shapes)."""
    out = {name: _theirs(_get(params, path), kind, config) for path, name, kind in _single_names(config)}
    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        for path, name, kind in _block_names(config, side):
            stacked = _get(params, (side, "blocks", *path))
            for i in range(layers):
                out[f"{side}.block.{i}.{name}"] = _theirs(stacked[i], kind, config)
    return out


def is_ignored(name: str) -> bool:
    """Whether a file may hold this tensor although the model has no such parameter."""
    return name in _ALIASES or name == _STRAY


def find_shared(names: Mapping[str, Any]) -> str:
    """The name under which a file has the embedding table."""
    return next((name for name in ("shared.weight", *_ALIASES) if name in names), "shared.weight")


def keeps_float32(name: str) -> bool:
    """Whether a tensor stays in float32 in a bfloat16 file: gates, whose decisions rounding would flip."""
    return "delete_gate" in name or "boundary_predictor" in name or "down_ln" in name
