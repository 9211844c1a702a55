"""H-Net's published weights -> our parameters (names and shapes of goombalab/hnet's state dict)."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bytelm.config import StackConfig, parse_layout
from bytelm.models.build import Params

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
