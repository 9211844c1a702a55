"""Published token decoders (transformers' GPT-2, Llama, Mistral, Qwen 2 and 3, SmolLM) <-> our parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bytelm.checkpoint import CheckpointError
from bytelm.config import ConfigError
from bytelm.models.build import Params
from bytelm.models.token_lm import RotaryScaling, TokenLMConfig

LLAMA_KINDS = ("llama", "mistral", "qwen2", "qwen3", "smollm")
KINDS = (*LLAMA_KINDS, "gpt2")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
                "gelu": "gelu"}  # fmt: skip


def is_token_lm(record: dict[str, Any]) -> bool:
    """Whether a config.json is one of a token decoder that is read here."""
    return record.get("model_type") in KINDS


def config_from(record: dict[str, Any], where: str, dtype: str = "float32") -> TokenLMConfig:
    """The config behind a published config.json. Raises ConfigError naming what is missing or not supported."""
    kind = record.get("model_type")
    if kind not in KINDS:
        raise ConfigError(f"{where}: model_type {kind!r} is no token decoder known here ({', '.join(KINDS)})")
    try:
        return (_gpt2 if kind == "gpt2" else _llama)(record, where, dtype)
    except KeyError as e:
        raise ConfigError(f"{where}: has no {e.args[0]}") from None
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{where}: {e}") from None


def _activation(name: str, where: str) -> Any:
    if name not in _ACTIVATIONS:
        raise ConfigError(f"{where}: activation {name!r} is not known ({', '.join(_ACTIVATIONS)})")
    return _ACTIVATIONS[name]


def _gpt2(r: dict[str, Any], where: str, dtype: str) -> TokenLMConfig:
    if r.get("scale_attn_by_inverse_layer_idx") or not r.get("scale_attn_weights", True):
        raise ConfigError(f"{where}: attention scores scaled in another way than by 1 / sqrt(head width)")
    d, heads = r["n_embd"], r["n_head"]
    return TokenLMConfig(
        vocabulary=r["vocab_size"], d_model=d, layers=r["n_layer"], num_heads=heads, kv_heads=heads,
        head_dim=d // heads, d_mlp=r.get("n_inner") or 4 * d, context=r.get("n_positions") or r["n_ctx"],
        norm="layer", norm_eps=r.get("layer_norm_epsilon", 1e-5),
        activation=_activation(r.get("activation_function", "gelu_new"), where),
        gated=False, qkv_bias=True, out_bias=True, mlp_bias=True, rope_theta=0.0,
        tie_embeddings=r.get("tie_word_embeddings", True), dtype=dtype,
    )  # fmt: skip


def _llama(r: dict[str, Any], where: str, dtype: str) -> TokenLMConfig:
    kind, layers = r["model_type"], r["num_hidden_layers"]
    heads, d = r["num_attention_heads"], r["hidden_size"]
    rope = r.get("rope_parameters") or {}
    bias = r.get("attention_bias", kind == "qwen2")
    window, windowed = r.get("sliding_window") or 0, ()
    if kind.startswith("qwen"):
        window = window if r.get("use_sliding_window") else 0
        if window:
            types = r.get("layer_types")
            first = r.get("max_window_layers", layers)
            windowed = tuple(t == "sliding_attention" for t in types) if types else tuple(
                i >= first for i in range(layers))  # fmt: skip
    return TokenLMConfig(
        vocabulary=r["vocab_size"], d_model=d, layers=layers, num_heads=heads,
        kv_heads=r.get("num_key_value_heads") or heads, head_dim=r.get("head_dim") or d // heads,
        d_mlp=r["intermediate_size"], context=r.get("max_position_embeddings", 2048),
        norm_eps=r.get("rms_norm_eps", 1e-6), activation=_activation(r.get("hidden_act", "silu"), where),
        qkv_bias=bias, out_bias=bias and kind != "qwen2", mlp_bias=r.get("mlp_bias", False), qk_norm=kind == "qwen3",
        rope_theta=float(rope.get("rope_theta") or r.get("rope_theta") or 1e4),
        scaling=_scaling(r.get("rope_scaling") or rope, r, where),
        tie_embeddings=r.get("tie_word_embeddings", False), window=window, windowed=windowed, dtype=dtype,
    )  # fmt: skip


def _scaling(rope: dict[str, Any], record: dict[str, Any], where: str) -> RotaryScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RotaryScaling(kind="linear", factor=float(rope["factor"]))
    if kind == "llama3":
        return RotaryScaling(
            kind="llama3", factor=float(rope["factor"]), low=float(rope["low_freq_factor"]),
            high=float(rope["high_freq_factor"]), original=int(rope["original_max_position_embeddings"]),
        )  # fmt: skip
    raise ConfigError(f"{where}: rotary scaling of type {kind!r} is not known (default, linear, llama3)")


# Our name of a block's parameter -> (name there, how a tensor there becomes ours).
_Turn = Callable[[NDArray, TokenLMConfig], NDArray]


def as_heads(x: NDArray, c: TokenLMConfig) -> NDArray:
    return x.T.reshape(c.d_model, -1, c.head_dim)


def _head_bias(x: NDArray, c: TokenLMConfig) -> NDArray:
    return x.reshape(-1, c.head_dim)


def as_out(x: NDArray, c: TokenLMConfig) -> NDArray:
    return x.T.reshape(c.num_heads, c.head_dim, c.d_model)


def as_turned(x: NDArray, c: TokenLMConfig) -> NDArray:
    return x.T


def same(x: NDArray, c: TokenLMConfig) -> NDArray:
    return x


LLAMA: dict[str, tuple[str, _Turn]] = {
    "attention_norm/scale": ("input_layernorm.weight", same),
    "mlp_norm/scale": ("post_attention_layernorm.weight", same),
    "q/kernel": ("self_attn.q_proj.weight", as_heads), "q/bias": ("self_attn.q_proj.bias", _head_bias),
    "k/kernel": ("self_attn.k_proj.weight", as_heads), "k/bias": ("self_attn.k_proj.bias", _head_bias),
    "v/kernel": ("self_attn.v_proj.weight", as_heads), "v/bias": ("self_attn.v_proj.bias", _head_bias),
    "out/kernel": ("self_attn.o_proj.weight", as_out), "out/bias": ("self_attn.o_proj.bias", same),
    "q_norm/scale": ("self_attn.q_norm.weight", same), "k_norm/scale": ("self_attn.k_norm.weight", same),
    "gate/kernel": ("mlp.gate_proj.weight", as_turned), "gate/bias": ("mlp.gate_proj.bias", same),
    "up/kernel": ("mlp.up_proj.weight", as_turned), "up/bias": ("mlp.up_proj.bias", same),
    "down/kernel": ("mlp.down_proj.weight", as_turned), "down/bias": ("mlp.down_proj.bias", same),
}  # fmt: skip
LLAMA_TOP = {
    "embed/table": ("model.embed_tokens.weight", same),
    "norm/scale": ("model.norm.weight", same),
    "head/kernel": ("lm_head.weight", as_turned),
}


def _third(n: int, bias: bool) -> _Turn:
    """Queries, keys or values out of GPT-2's joint projection, which is stored [in, 3 out]."""

    def take(x: NDArray, c: TokenLMConfig) -> NDArray:
        part = np.split(x, 3, axis=-1)[n]
        return part.reshape(c.num_heads, c.head_dim) if bias else part.reshape(c.d_model, c.num_heads, c.head_dim)

    return take


_GPT2: dict[str, tuple[str, _Turn]] = {
    "attention_norm/scale": ("ln_1.weight", same), "attention_norm/bias": ("ln_1.bias", same),
    "mlp_norm/scale": ("ln_2.weight", same), "mlp_norm/bias": ("ln_2.bias", same),
    **{f"{name}/{part}": (f"attn.c_attn.{there}", _third(n, part == "bias"))
       for n, name in enumerate("qkv") for part, there in (("kernel", "weight"), ("bias", "bias"))},
    "out/kernel": ("attn.c_proj.weight", lambda x, c: x.reshape(c.num_heads, c.head_dim, c.d_model)),
    "out/bias": ("attn.c_proj.bias", same),
    "up/kernel": ("mlp.c_fc.weight", same), "up/bias": ("mlp.c_fc.bias", same),
    "down/kernel": ("mlp.c_proj.weight", same), "down/bias": ("mlp.c_proj.bias", same),
}  # fmt: skip
_GPT2_TOP = {
    "embed/table": ("wte.weight", same), "positions/table": ("wpe.weight", same),
    "norm/scale": ("ln_f.weight", same), "norm/bias": ("ln_f.bias", same), "head/kernel": ("lm_head.weight", as_turned),
}  # fmt: skip


def params_from(
    tensors: Mapping[str, NDArray], config: TokenLMConfig, expected: Params, where: str, shardings: Any = None
) -> Params:
    """Parameters in the structure of `expected` out of published tensors, in the config's type, each put where
    `shardings` says as soon as it is read. Raises CheckpointError for what is missing, misshapen or left over."""
    gpt2 = not config.rope_theta
    top, block = (_GPT2_TOP, _GPT2) if gpt2 else (LLAMA_TOP, LLAMA)
    prefix = "transformer." if gpt2 and any(name.startswith("transformer.") for name in tensors) else ""
    layers = f"{prefix}h" if gpt2 else "model.layers"
    used: set[str] = set()

    def take(name: str) -> NDArray:
        if name not in tensors:
            raise CheckpointError(f"{where}: has no tensor {name}")
        used.add(name)
        return np.asarray(tensors[name])

    def read(path: tuple, shape: jax.ShapeDtypeStruct, sharding: Any = None) -> Any:
        name = "/".join(str(key.key) for key in path)
        if name.startswith("blocks/"):
            there, turn = block[name.removeprefix("blocks/")]
            value = np.stack([turn(take(f"{layers}.{i}.{there}"), config) for i in range(config.layers)])
        else:
            there, turn = top[name]
            full = there if there.startswith(("model.", "lm_head")) else prefix + there
            value = turn(take(full), config)
        if value.shape != shape.shape:
            raise CheckpointError(f"{where}: {name} has shape {value.shape}, the config says {shape.shape}")
        kind = jnp.float32 if value.ndim < 2 else config.dtype
        return jnp.asarray(value, kind) if sharding is None else jax.device_put(value.astype(kind), sharding)

    more = () if shardings is None else (shardings,)
    params = jax.tree.map_with_path(read, expected, *more)
    rest = [n for n in tensors if n not in used and not n.endswith((".attn.bias", ".attn.masked_bias", "inv_freq"))]
    rest = [n for n in rest if not (n == "lm_head.weight" and config.tie_embeddings)]
    if rest:
        raise CheckpointError(f"{where}: does not fit its config: unknown {', '.join(sorted(rest)[:8])}")
    return params
