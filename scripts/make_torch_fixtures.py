"""Makes tests/golden/hnet_pt with torch.save: needs torch, safetensors and numpy only (extra `reference`).

- hnet_<name>.pt and .json for each published H-Net: its whole key list at reduced widths. To stay small, every tensor
  is a view of one shared storage: tensor i is POOL[offset_i:][:size] in the order of the state dict, and
  offset_i = 37 i mod 997.
- small.pt and small.json: the weights of tests/golden/hnet_batch3_ragged in bfloat16, each with a storage of its own.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
STEP, WRAP = 37, 997
LAYOUTS = {
    "1stage_L": ["m4", ["T22"], "m4"],
    "1stage_XL": ["m4", ["T24"], "m4"],
    "2stage_L": ["m4", ["T1m4", ["T26"], "m4T1"], "m4"],
    "2stage_XL": ["m4", ["T1m4", ["T27"], "m4T1"], "m4"],
    "2stage_XL_chinese": ["m4", ["T1m4", ["T30"], "m4T1"], "m4"],
    "2stage_XL_code": ["m4", ["T1m4", ["T28"], "m4T1"], "m4"],
}
N, TAPS, MLP = 8, 4, 128  # d_state, d_conv, d_intermediate of the reduced models


def shape(key: str, d: int, outer: int) -> tuple[int, ...]:
    """Shape of a tensor of a stage of width d inside one of width `outer`."""
    inner, heads = 2 * d, 2 * d // 64
    name = key.split("layers.")[-1].split(".", 1)[-1] if "layers." in key else key.rsplit("network.", 1)[-1]
    table = {
        "norm1.weight": (d,), "norm2.weight": (d,), "mlp.fc1.weight": (2 * MLP, d), "mlp.fc2.weight": (d, MLP),
        "mixer.Wqkv.weight": (3 * d, d), "mixer.in_proj.weight": (2 * inner + 2 * N + heads, d),
        "mixer.conv1d.weight": (inner + 2 * N, 1, TAPS), "mixer.conv1d.bias": (inner + 2 * N,),
        "mixer.dt_bias": (heads,), "mixer.A_log": (heads,), "mixer.D": (heads,), "mixer.norm.weight": (inner,),
    }  # fmt: skip
    if name in table:
        return table[name]
    if key.endswith("mixer.out_proj.weight"):
        return (d, -1)  # filled in below: attention d, Mamba 2 d
    if key.endswith("pad_dimension"):
        return (d - outer,)
    if key.endswith("rmsnorm.weight") or key.endswith("residual_proj.bias"):
        return (d,)
    return (d, d)


def reduced(name: str) -> tuple[dict, dict]:
    levels = 1 if name.startswith("1") else 2
    same = name == "2stage_L"  # its middle stage is as wide as its outer one
    widths = [32, 64] if levels == 1 else [32, 32, 64] if same else [32, 64, 96]
    keys = [line.split("\t")[0] for line in (GOLDEN / f"hnet_state_dicts/hnet_{name}.tsv").read_text().splitlines()]
    mambas = {key.rsplit("mixer.", 1)[0] for key in keys if "in_proj" in key}
    kinds = dict(line.split("\t")[::2] for line in
                 (GOLDEN / f"hnet_state_dicts/hnet_{name}.tsv").read_text().splitlines())  # fmt: skip
    views = {}
    for i, key in enumerate(keys):
        if key in ("embeddings.weight", "lm_head.weight"):
            size = (256, widths[0])
        else:
            stage = key.count("main_network.") - (1 if key.count("main_network.") > levels else 0)
            size = shape(key, widths[stage], widths[max(stage - 1, 0)])
            if size[-1] == -1:
                size = (size[0], size[0] * (2 if key.rsplit("mixer.", 1)[0] in mambas else 1))
        count, offset = torch.Size(size).numel(), STEP * i % WRAP
        dtype = torch.float32 if kinds[key] == "float32" else torch.bfloat16
        views[key] = (dtype, offset, offset + count, size)
    pools = {}
    for kind in (torch.bfloat16, torch.float32):  # no longer than needed: torch.save writes whole storages
        longest = max(end for dtype, _, end, _ in views.values() if dtype == kind)
        pools[kind] = (torch.arange(longest) % 251 / 64 - 2).to(kind)
    state = {key: pools[dtype][start:end].view(size) for key, (dtype, start, end, size) in views.items()}
    config = {
        "arch_layout": LAYOUTS[name], "d_model": widths, "d_intermediate": [0] + [MLP] * levels, "vocab_size": 256,
        "ssm_cfg": {"chunk_size": 256, "d_conv": TAPS, "d_state": N, "expand": 2},
        "attn_cfg": {"num_heads": [2] * (levels + 1), "rotary_emb_dim": [16] * (levels + 1),
                     "window_size": [1023] * levels + [-1]},
        "tie_embeddings": False,
    }  # fmt: skip
    return state, config


def main() -> None:
    target = GOLDEN / "hnet_pt"
    target.mkdir(exist_ok=True)
    for name in LAYOUTS:
        state, config = reduced(name)
        torch.save(state, target / f"hnet_{name}.pt")
        (target / f"hnet_{name}.json").write_text(json.dumps(config) + "\n")
    case = GOLDEN / "hnet_batch3_ragged"
    weights = {key: value.to(torch.bfloat16) for key, value in load_file(case / "weights.safetensors").items()}
    torch.save(weights, target / "small.pt")
    (target / "small.json").write_text((case / "config.json").read_text())


if __name__ == "__main__":
    main()
