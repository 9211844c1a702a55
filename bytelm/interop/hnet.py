"""H-Net's published weights and configs <-> ours (names and shapes of goombalab/hnet's state dict and config JSON)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bytelm.config import ConfigError, HNetConfig, SSMConfig, StackConfig, parse_layout
from bytelm.models.build import Params

HEAD_DIM = 64  # of every published Mamba-2 block
MLP_MULTIPLE = 128  # the reference rounds MLP widths up to it
TRAINED_LENGTH = 8192  # bytes per row of the published models
Weights = Mapping[str, NDArray]


def stack_params(weights: Weights, prefix: str, config: StackConfig) -> Params:
    """Parameters of our Stack from an isotropic stack at `prefix` (such as "backbone.encoder.").

    There weights are [out, in] and layers are numbered through; here kernels are [in, out...] and equal layers are
    stacked by run. `in_proj` holds z, x, B, C, dt in that order, `Wqkv` q, k, v, `fc1` value then gate.
    """
    out: Params = {"norm": {"scale": weights[prefix + "rmsnorm.weight"]}}
    layer = 0
    for i, (kind, count) in enumerate(parse_layout(config.layout)):
        blocks = [_block(weights, f"{prefix}layers.{layer + j}.", kind, config) for j in range(count)]
        out[f"run{i}"] = _stacked(blocks)
        layer += count
    return out


def _stacked(trees: list) -> Params | NDArray:
    if isinstance(trees[0], dict):
        return {key: _stacked([tree[key] for tree in trees]) for key in trees[0]}
    return np.stack(trees)


def _block(w: Weights, prefix: str, kind: str, config: StackConfig) -> Params:
    block: Params = {"mixer_norm": {"scale": w[prefix + "norm1.weight"]}}
    if kind in "tT":
        block["attention"] = _attention(w, prefix + "mixer.", config)
    else:
        block["mamba"] = _mamba(w, prefix + "mixer.", config)
    if kind.isupper():
        value, gate = np.split(w[prefix + "mlp.fc1.weight"].T, 2, axis=1)
        block["mlp_norm"] = {"scale": w[prefix + "norm2.weight"]}
        block["mlp"] = {
            "gate": {"kernel": gate}, "up": {"kernel": value}, "down": {"kernel": w[prefix + "mlp.fc2.weight"].T},
        }  # fmt: skip
    return block


def _attention(w: Weights, prefix: str, config: StackConfig) -> Params:
    d, heads, width = config.d_model, config.num_heads, config.head_width
    qkv = w[prefix + "Wqkv.weight"].T.reshape(d, 3, heads, width)
    out = {name: {"kernel": qkv[:, i]} for i, name in enumerate("qkv")}
    return out | {"out": {"kernel": w[prefix + "out_proj.weight"].T.reshape(heads, width, d)}}


def _mamba(w: Weights, prefix: str, config: StackConfig) -> Params:
    d, s, heads = config.d_model, config.ssm, config.ssm_heads
    inner, n, p = heads * s.head_dim, s.d_state, s.head_dim
    z, x, bc, dt = np.split(w[prefix + "in_proj.weight"].T, np.cumsum([inner, inner, 2 * n]), axis=1)
    conv, bias = w[prefix + "conv1d.weight"][:, 0].T, w[prefix + "conv1d.bias"]  # [taps, channels], newest tap last
    return {
        "z": {"kernel": z.reshape(d, heads, p)},
        "x": {"kernel": x.reshape(d, heads, p)},
        "bc": {"kernel": bc.reshape(d, 2, n)},
        "dt": {"kernel": dt},
        "conv_x": {"kernel": conv[:, :inner].reshape(-1, heads, p), "bias": bias[:inner].reshape(heads, p)},
        "conv_bc": {"kernel": conv[:, inner:].reshape(-1, 2, n), "bias": bias[inner:].reshape(2, n)},
        "dt_bias": w[prefix + "dt_bias"],
        "A_log": w[prefix + "A_log"],
        "D": w[prefix + "D"],
        "norm": {"scale": w[prefix + "norm.weight"].reshape(heads, p)},
        "out": {"kernel": w[prefix + "out_proj.weight"].T.reshape(heads, p, d)},
    }


def params_from(weights: Weights, config: HNetConfig) -> Params:
    """Our parameters from a state dict. Raises KeyError for a missing tensor, ValueError for a misshapen one."""

    def stage(s: int) -> Params:
        prefix = "backbone." + "main_network." * s
        out: Params = {}
        if s and config.d_model[s] > config.d_model[s - 1]:
            out["pad"] = weights[prefix + "pad_dimension"]
        if s == config.levels:
            return out | {"main": stack_params(weights, prefix + "main_network.", config.stack(s, "main"))}
        for part in ("encoder", "decoder"):
            out[part] = stack_params(weights, f"{prefix}{part}.", config.stack(s, part))
        out["router"] = {
            name: {"kernel": weights[f"{prefix}routing_module.{name}_proj_layer.weight"].T} for name in "qk"
        }
        out["residual"] = {
            "kernel": weights[prefix + "residual_proj.weight"].T, "bias": weights[prefix + "residual_proj.bias"],
        }  # fmt: skip
        return out | {"inner": stage(s + 1)}

    params: Params = {"embed": {"table": weights["embeddings.weight"]}, "backbone": stage(0)}
    if not config.tie_embeddings:
        params["head"] = {"kernel": weights["lm_head.weight"].T}
    return params


def state_dict(params: Params, config: HNetConfig) -> dict[str, Any]:
    """A state dict in the reference's names and shapes from our parameters (numpy, or traced): the inverse of
    `params_from`."""
    xp = np if isinstance(params["embed"]["table"], np.ndarray) else jnp
    out: dict[str, Any] = {"embeddings.weight": params["embed"]["table"]}
    node = params["backbone"]
    for s in range(config.levels + 1):
        prefix = "backbone." + "main_network." * s
        if "pad" in node:
            out[prefix + "pad_dimension"] = node["pad"]
        if s == config.levels:
            out |= _stack_weights(node["main"], prefix + "main_network.", config.stack(s, "main"), xp)
            break
        for part in ("encoder", "decoder"):
            out |= _stack_weights(node[part], f"{prefix}{part}.", config.stack(s, part), xp)
        for name in "qk":
            out[f"{prefix}routing_module.{name}_proj_layer.weight"] = node["router"][name]["kernel"].T
        out[prefix + "residual_proj.weight"] = node["residual"]["kernel"].T
        out[prefix + "residual_proj.bias"] = node["residual"]["bias"]
        node = node["inner"]
    out["lm_head.weight"] = params["embed"]["table"] if config.tie_embeddings else params["head"]["kernel"].T
    return out


def keeps_float32(name: str) -> bool:
    """Whether the reference holds this tensor in float32 in a bfloat16 model too."""
    return name.endswith("mixer.D") or "residual_proj" in name


def _stack_weights(params: Params, prefix: str, config: StackConfig, xp: Any) -> dict[str, Any]:
    out = {prefix + "rmsnorm.weight": params["norm"]["scale"]}
    layer = 0
    for i, (kind, count) in enumerate(parse_layout(config.layout)):
        for j in range(count):
            block = _layer(params[f"run{i}"], j)
            out |= {f"{prefix}layers.{layer}.{name}": value for name, value in _block_weights(block, kind, xp).items()}
            layer += 1
    return out


def _layer(tree: Params, index: int) -> Params:
    return {k: _layer(v, index) if isinstance(v, dict) else v[index] for k, v in tree.items()}


def _block_weights(block: Params, kind: str, xp: Any) -> dict[str, Any]:
    out = {"norm1.weight": block["mixer_norm"]["scale"]}
    if kind in "tT":
        kernels = {name: module["kernel"] for name, module in block["attention"].items()}
        d = kernels["q"].shape[0]
        out["mixer.Wqkv.weight"] = xp.concatenate([kernels[name].reshape(d, -1) for name in "qkv"], axis=1).T
        out["mixer.out_proj.weight"] = kernels["out"].reshape(-1, d).T
    else:
        m = block["mamba"]
        d, taps = m["z"]["kernel"].shape[0], m["conv_x"]["kernel"].shape[0]
        parts = [m[name]["kernel"].reshape(d, -1) for name in ("z", "x", "bc", "dt")]
        conv = [m[name]["kernel"].reshape(taps, -1) for name in ("conv_x", "conv_bc")]
        out["mixer.in_proj.weight"] = xp.concatenate(parts, axis=1).T
        out["mixer.conv1d.weight"] = xp.concatenate(conv, axis=1).T[:, None]
        out["mixer.conv1d.bias"] = xp.concatenate([m[name]["bias"].reshape(-1) for name in ("conv_x", "conv_bc")])
        out |= {f"mixer.{name}": m[name] for name in ("dt_bias", "A_log", "D")}
        out["mixer.norm.weight"] = m["norm"]["scale"].reshape(-1)
        out["mixer.out_proj.weight"] = m["out"]["kernel"].reshape(-1, d).T
    if kind.isupper():
        out["norm2.weight"] = block["mlp_norm"]["scale"]
        out["mlp.fc1.weight"] = xp.concatenate([block["mlp"][name]["kernel"] for name in ("up", "gate")], axis=1).T
        out["mlp.fc2.weight"] = block["mlp"]["down"]["kernel"].T
    return out


def config_from(record: Mapping[str, Any], where: str = "config.json") -> HNetConfig:
    """Our config from the reference's JSON. Targets of the ratio loss, which it does not hold, are the paper's.

    Raises ConfigError for what is missing or what we cannot run.
    """
    try:
        d_model, ssm, attention = _whole(record["d_model"], "d_model"), record["ssm_cfg"], record["attn_cfg"]
        layout = _layout_text(record["arch_layout"])
        levels = len(d_model) - 1
        fields = {name: _scalar(ssm[name], name) for name in ("chunk_size", "d_conv", "d_state", "expand")}
        if record.get("vocab_size", 256) != 256:
            raise ConfigError(f"vocab_size={record['vocab_size']}: a byte model has 256")
        mlp = _whole(record["d_intermediate"], "d_intermediate")
        config = HNetConfig(
            arch_layout=layout,
            d_model=d_model,
            d_mlp=tuple(-(-f // MLP_MULTIPLE) * MLP_MULTIPLE for f in mlp),
            num_heads=_whole(attention["num_heads"], "num_heads"),
            rope_dim=_whole(attention["rotary_emb_dim"], "rotary_emb_dim"),
            window=tuple(0 if w < 0 else w + 1 for w in _whole(attention["window_size"], "window_size")),
            ssm=SSMConfig(d_state=fields["d_state"], expand=fields["expand"], conv_width=fields["d_conv"],
                          chunk=fields["chunk_size"], head_dim=HEAD_DIM),
            targets={0: (), 1: (6.0,), 2: (3.0, 3.0)}.get(levels, (3.0,) * levels),
            tie_embeddings=bool(record.get("tie_embeddings", False)),
        )  # fmt: skip
        for s in range(levels + 1):  # 0 means "none" there and "choose" here
            blocks = "".join(config.stack(s, part).layout for part in _parts(config, s))
            if mlp[s] == 0 and any(c.isupper() for c in blocks):
                raise ConfigError(f"d_intermediate of stage {s} is 0, but its layout {blocks} has blocks with an MLP")
            if config.rope_dim[s] == 0 and any(c in "tT" for c in blocks):
                raise ConfigError(f"rotary_emb_dim of stage {s} is 0: attention without rotation is not supported")
        return config
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as e:
        reason = str(e) if isinstance(e, ConfigError) else f"not an H-Net config: {e!r}"
        raise ConfigError(f"{where}: {reason}") from None


def _parts(config: HNetConfig, stage: int) -> tuple[str, ...]:
    """The stacks of a stage."""
    return ("encoder", "decoder") if stage < config.levels else ("main",)


def _whole(values: Any, name: str) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(v) is int for v in values):
        raise ConfigError(f"{name}={values!r}: expected a list of whole numbers, one per stage")
    return tuple(values)


def _layout_text(layout: Any) -> str:
    if isinstance(layout, list) and len(layout) == 1 and isinstance(layout[0], str):
        return layout[0]
    if isinstance(layout, list) and len(layout) == 3:
        return f"{layout[0]},[{_layout_text(layout[1])}],{layout[2]}"
    raise ConfigError(f"arch_layout={layout!r}: expected [encoder, [inner], decoder] or [main]")


def _scalar(value: Any, name: str) -> int:
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise ConfigError(f"ssm_cfg.{name}={value}: one value for all stages is supported")
        return int(value[0])
    return int(value)


def reference_config(config: HNetConfig) -> dict[str, Any]:
    """The reference's JSON of a config. Raises ConfigError for what the reference cannot express."""
    levels = config.levels
    if config.chunker != "learned":
        raise ConfigError(f"model.chunker={config.chunker!r}: the reference knows learned boundaries only")
    if config.ahead.bytes:
        raise ConfigError(f"model.ahead.bytes={config.ahead.bytes}: the reference has no heads for further bytes")
    stacks = [config.stack(s, "encoder" if s < levels else "main") for s in range(levels + 1)]
    mlp = [any(c.isupper() for p in _parts(config, s) for c in config.stack(s, p).layout) for s in range(levels + 1)]
    for s, stack in enumerate(stacks):
        if mlp[s] and stack.mlp_width % MLP_MULTIPLE:
            raise ConfigError(f"model.d_mlp of stage {s} is {stack.mlp_width}: the reference has multiples of 128 only")
    if config.ssm.head_dim != HEAD_DIM or config.norm_eps != 1e-5:
        raise ConfigError(f"model.ssm.head_dim={config.ssm.head_dim}, norm_eps={config.norm_eps}: the reference has 64 "
                          "and 1e-5 only")  # fmt: skip
    layout: list = [stacks[levels].layout]
    for s in reversed(range(levels)):
        layout = [config.stack(s, "encoder").layout, layout, config.stack(s, "decoder").layout]
    return {
        "arch_layout": layout,
        "d_model": list(config.d_model),
        "d_intermediate": [stack.mlp_width if has else 0 for stack, has in zip(stacks, mlp)],
        "vocab_size": 256,
        "ssm_cfg": {"chunk_size": config.ssm.chunk, "d_conv": config.ssm.conv_width, "d_state": config.ssm.d_state,
                    "expand": config.ssm.expand},
        "attn_cfg": {
            "num_heads": [stack.num_heads for stack in stacks],
            "rotary_emb_dim": [stack.rotary for stack in stacks],
            "window_size": [stack.window - 1 if stack.window else -1 for stack in stacks],
        },
        "tie_embeddings": config.tie_embeddings,
    }  # fmt: skip
