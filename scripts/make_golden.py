"""Makes tests/golden/flat_tiny: a parity case of the flat family from the numpy twin in float64.

Logits, loss and gradients come from tests/twin.py, which shares no code with bytelm; the gradients are central
differences, one parameter entry at a time. Run from the repository root: python scripts/make_golden.py
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import twin  # noqa: E402
from bytelm.config import FlatConfig, SSMConfig, StackConfig, parse_layout  # noqa: E402
from bytelm.interop.weights import save_weights  # noqa: E402
from bytelm.models.build import structure  # noqa: E402
from bytelm.parallel.rules import path_string  # noqa: E402

CONFIG = FlatConfig(
    stack=StackConfig(layout="M1t1T1", d_model=8, num_heads=4, num_kv_heads=2, head_dim=4, d_mlp=8, window=6,
                      ssm=SSMConfig(d_state=3, head_dim=4, chunk=4)),
    tie_embeddings=False,
)  # fmt: skip
LENGTHS = (11, 2, 7)  # documents packed into each row


def draw_weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random weights away from their initial values, so that every path matters; float32 values."""
    out = {}
    for path, leaf in jax.tree.leaves_with_path(structure(CONFIG)[1]):
        name = path_string(path)
        near_one = name.endswith(("scale", "D"))
        value = (1.0 if near_one else 0.0) + (0.2 if near_one else 0.5) * rng.standard_normal(leaf.shape)
        out[name] = value.astype(np.float32)
    return out


def row_logits(inputs: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    runs, out, start = parse_layout(CONFIG.stack.layout), [], 0
    for length in LENGTHS:
        out.append(twin.flat(inputs[start : start + length], weights, CONFIG, runs))
        start += length
    return np.concatenate(out)


def main() -> None:
    rng = np.random.default_rng(0)
    stored = draw_weights(rng)
    weights = {name: w.astype(np.float64) for name, w in stored.items()}
    inputs, targets = (rng.integers(0, 257, (2, sum(LENGTHS))) for _ in range(2))
    segments = np.tile(np.repeat(np.arange(1, len(LENGTHS) + 1), LENGTHS), (2, 1))

    def loss() -> float:
        return float(np.mean([twin.nll(row_logits(x, weights), y) for x, y in zip(inputs, targets)]))

    logits = np.stack([row_logits(x, weights) for x in inputs])
    io = {"inputs": inputs.astype(np.int32), "targets": targets.astype(np.int32), "segments": segments.astype(np.int32),
          "logits": logits.astype(np.float32), "loss": np.array(loss(), np.float32)}  # fmt: skip
    used = np.unique(inputs)
    for name, weight in weights.items():
        gradient = np.zeros(weight.shape)
        for index in np.ndindex(weight.shape):
            if name == "embed/table" and index[0] not in used:
                continue
            if name == "head/kernel" and index[1] >= 257:
                continue
            before = weight[index]
            weight[index] = before + 1e-5
            up = loss()
            weight[index] = before - 1e-5
            gradient[index] = (up - loss()) / 2e-5
            weight[index] = before
        io[f"grad.{name}"] = gradient.astype(np.float32)
        print(name, weight.shape, flush=True)
    case = ROOT / "tests/golden/flat_tiny"
    tree: dict = {}
    for name, value in stored.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    save_weights(case, CONFIG, tree, context=sum(LENGTHS))
    (case / "model.safetensors").rename(case / "weights.safetensors")
    save_file(io, case / "io.safetensors")
    print(json.dumps({"case": str(case.relative_to(ROOT)), "loss": float(io["loss"])}))


if __name__ == "__main__":
    main()
