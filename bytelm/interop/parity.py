"""Does this machine still give the reference numbers? Runs a saved case and compares.

A case is a directory with config.json, weights.safetensors and io.safetensors. Cases of the flat family have a weights
directory's config.json, weights by our parameter paths, and in io.safetensors `inputs` [b, t], `targets`, `segments`
(optional), `logits` [b, t, 257], `loss` (mean nats over positions with segment > 0), and `grad.<parameter>` of that
loss. Cases of H-Net have the reference's config.json and names (`parity_hnet.py`).
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from bytelm.checkpoint import CheckpointError
from bytelm.config import ConfigError
from bytelm.interop import hierarchical, t5
from bytelm.interop.parity_hierarchical import measure_hierarchical
from bytelm.interop.parity_hnet import measure_hnet, need_tensors
from bytelm.interop.parity_t5 import measure_t5
from bytelm.interop.published import is_model, read_record
from bytelm.interop.weights import is_weights_dir, load_config
from bytelm.models.build import structure
from bytelm.parallel.rules import path_string
from bytelm.train.losses import token_nll

TOLERANCES = {
    "max_abs_logit_error": 2e-5,
    "max_abs_prob_error": 1e-6,
    "max_abs_gate_error": 2e-5,  # of boundary logits; a delete gate's goes with its scale (`parity_t5.py`)
    "max_abs_step_error": 2e-5,
    "loss_error": 2e-6,
    "max_rel_grad_error": 1e-4,
}
PRECISIONS = ("highest", "high", "default")


def run_case(case: Path, precision: str = "highest") -> dict[str, Any]:
    """Compares our implementation with a case: one JSON-able record; keys without data are None.

    `precision` is jax's matmul precision; the tolerances hold at `highest`, elsewhere `ok` judges by the same figures
    and says what it finds. Raises CheckpointError or ConfigError for a case that cannot be read.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision {precision}: choose one of {', '.join(PRECISIONS)}")
    if not (case / "config.json").exists():
        raise CheckpointError(f"{case}: no config.json; a case holds config.json, weights.safetensors, io.safetensors")
    io, weights = _read(case / "io.safetensors"), _read(case / "weights.safetensors")
    with jax.default_matmul_precision(precision):
        if is_weights_dir(case):
            family, measured = "flat", _flat(case, io, weights)
        elif t5.is_t5(record := read_record(case)):
            family, measured = record["model_type"], measure_t5(case, io, weights)
        elif hierarchical.is_hierarchical(record):
            family, measured = measure_hierarchical(case, io, weights)
        elif is_model(case):
            family, measured = "hnet", measure_hnet(case, io, weights)
        else:
            raise ConfigError(
                f"{case}: this version of bytelm runs parity cases of the flat family, H-Net, ByT5, MrT5, "
                "HAT, SpaceByte, MegaByte and BLT"
            )
    result: dict[str, Any] = {"family": family}
    keys = ("max_abs_logit_error", "max_abs_prob_error", "boundaries_equal", "max_abs_gate_error", "positions_equal",
            "greedy_equal", "max_abs_step_error", "loss_error", "max_rel_grad_error")  # fmt: skip
    result |= {key: measured.get(key) for key in keys}
    limits = TOLERANCES | ({"max_abs_gate_error": measured["gate_limit"]} if "gate_limit" in measured else {})
    result["tolerances"] = limits
    result |= {"precision": precision, "device": jax.devices()[0].device_kind}
    result["ok"] = all(_passes(result[key], limits.get(key)) for key in keys)
    return result


def _passes(value: Any, limit: float | None) -> bool:
    if value is None or isinstance(value, bool):
        return value is not False
    return limit is not None and math.isfinite(value) and value <= limit


def _read(file: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(file, framework="numpy") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{file}: cannot be read: {e}") from None


def _take(weights: dict[str, np.ndarray], name: str, shape: tuple[int, ...], case: Path) -> np.ndarray:
    if name not in weights or weights[name].shape != shape:
        found = f"shape {list(weights[name].shape)}" if name in weights else "nothing"
        raise CheckpointError(f"{case}/weights.safetensors: {name} should have shape {list(shape)}, found {found}")
    return weights[name]


def _flat(case: Path, io: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> dict[str, Any]:
    config, _ = load_config(case)
    graph, shapes = structure(config)
    params = jax.tree.map_with_path(lambda p, x: jnp.asarray(_take(weights, path_string(p), x.shape, case)), shapes)
    need_tensors(io, case, "inputs", "logits", *(["targets"] if "loss" in io else []))
    return _measure(graph, params, io)


def _measure(graph: nnx.GraphDef, params: Any, io: dict[str, np.ndarray]) -> dict[str, Any]:
    inputs = jnp.asarray(io["inputs"])
    segments = jnp.asarray(io["segments"]) if "segments" in io else None
    b, t = inputs.shape

    @jax.jit
    def forward(params):
        return nnx.merge(graph, params)(inputs, segments).logits

    logits = np.asarray(forward(params), np.float64)
    valid = np.ones((b, t), bool) if segments is None else io["segments"] > 0
    found: dict[str, Any] = {"max_abs_logit_error": float(np.abs(logits - io["logits"])[valid].max())}
    found["greedy_equal"] = bool((logits.argmax(-1) == io["logits"].argmax(-1))[valid].all())

    if segments is None:  # a cache holds one document
        half = max(t // 2, 1)

        @jax.jit
        def stepped(params):
            network = nnx.merge(graph, params)
            first, cache = network.prefill(inputs[:, :half], jnp.full(b, half), t)
            _, rest = jax.lax.scan(lambda c, x: network.step(x, c)[::-1], cache, inputs[:, half:].T)
            return jnp.concatenate([first[:, None], jnp.swapaxes(rest, 0, 1)], axis=1)

        found["max_abs_step_error"] = float(np.abs(np.asarray(stepped(params)) - io["logits"][:, half - 1 :]).max())

    if "loss" in io:
        targets = jnp.asarray(io["targets"])

        @jax.jit
        def loss(params):
            nll = token_nll(nnx.merge(graph, params)(inputs, segments).logits, targets)
            return jnp.sum(jnp.where(valid, nll, 0)) / valid.sum()

        value, grads = jax.value_and_grad(loss)(params)
        found["loss_error"] = abs(float(value) - float(io["loss"]))
        wanted = {name.removeprefix("grad."): g for name, g in io.items() if name.startswith("grad.")}
        ours = {path_string(p): np.asarray(g, np.float64) for p, g in jax.tree.leaves_with_path(grads)}
        unknown = wanted.keys() - ours.keys()
        if unknown:
            raise CheckpointError(f"io.safetensors has gradients of unknown parameters: {', '.join(sorted(unknown))}")
        errors = [np.abs(ours[n] - g).max() / max(np.abs(g).max(), 1e-30) for n, g in wanted.items()]
        found["max_rel_grad_error"] = float(np.max(errors)) if errors else None
    return found
