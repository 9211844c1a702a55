"""Parity cases of H-Net: the reference's config and state dict, and in io.safetensors

input_ids [b, t], mask [b, t] (True: real), logits [b, t, 256]; optionally stage{s}.padded.boundary_prob,
.boundary_mask and .valid [b, longest]; step.logits [b, t, 256]; loss.N, loss.ce, loss.ratio, loss.total (0.03 weight),
and grad.<reference name> of loss.total.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bytelm.checkpoint import CheckpointError
from bytelm.interop import hnet
from bytelm.interop.published import check_tensors
from bytelm.models.build import structure
from bytelm.train.losses import token_nll

Tensors = dict[str, np.ndarray]


def need_tensors(io: Tensors, case: Path, *names: str) -> None:
    """Raises CheckpointError when the case lacks one of its tensors."""
    for name in names:
        if name not in io:
            raise CheckpointError(f"{case}/io.safetensors: no tensor {name!r}")


def measure_hnet(case: Path, io: Tensors, weights: Tensors) -> dict[str, Any]:
    """Errors of our H-Net on a case, at full capacity. Losses are put together on the host in float64."""
    config = hnet.config_from(json.loads((case / "config.json").read_text(encoding="utf-8")), f"{case}/config.json")
    check_tensors({name: w.shape for name, w in weights.items()}, config, f"{case}/weights.safetensors")
    need_tensors(io, case, "input_ids", "mask", "logits")
    b, t = io["input_ids"].shape if io["input_ids"].ndim == 2 else (0, 0)
    if io["mask"].shape != (b, t) or io["logits"].shape != (b, t, 256) or not io["mask"].astype(bool)[:, :1].all():
        raise CheckpointError(
            f"{case}/io.safetensors: expected input_ids [b, t], mask [b, t] with a real byte in front of each row, and "
            f"logits [b, t, 256]; found {io['input_ids'].shape}, {io['mask'].shape}, {io['logits'].shape}"
        )
    if "loss.N" in io:
        config = dataclasses.replace(config, targets=tuple(float(n) for n in io["loss.N"].ravel()))
    graph, _ = structure(config)
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), hnet.params_from(weights, config))
    ids, mask = io["input_ids"].astype(np.int32), io["mask"].astype(bool)
    targets = np.roll(ids, -1, axis=1)
    scored = np.concatenate([mask[:, 1:], np.zeros_like(mask[:, :1])], axis=1)  # positions with a next byte

    def loss(params):
        out = nnx.merge(graph, params)(jnp.asarray(ids), jnp.asarray(mask, jnp.int32))
        nll = token_nll(out.logits, jnp.asarray(targets))
        return jnp.sum(jnp.where(scored, nll, 0)) / scored.sum() + out.aux_loss, (out, nll)

    if any(name.startswith("grad.") for name in io):
        (_, (out, nll)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    else:
        (_, (out, nll)), grads = jax.jit(loss)(params), None
    logits = np.asarray(out.logits)
    found: dict[str, Any] = {
        "max_abs_logit_error": float(np.abs(logits - io["logits"])[mask].max()),
        "greedy_equal": bool((logits.argmax(-1) == io["logits"].argmax(-1))[mask].all()),
    }
    found |= _levels(out.levels, io)
    if "step.logits" in io:
        found["max_abs_step_error"] = _step_error(graph, params, ids, mask, io["step.logits"])
    if "loss.total" in io:
        need_tensors(io, case, "loss.ce", "loss.ratio")
        ce = float(np.asarray(nll, np.float64)[scored].mean())
        ratio = np.array([float(out.metrics[f"level{s}/ratio_loss"]) for s in range(config.levels)])
        wanted = [float(io[f"loss.{name}"].ravel()[0]) for name in ("ce", "total")]
        errors = [ce - wanted[0], ce + float(out.aux_loss) - wanted[1], *(ratio - io["loss.ratio"].ravel())]
        found["loss_error"] = float(np.abs(errors).max())
    if grads is not None:
        found["max_rel_grad_error"] = _gradient_error(grads, config, io)
    return found


def _levels(levels: tuple, io: Tensors) -> dict[str, Any]:
    """Boundaries equal at every valid place of every level, and the largest error of a probability."""
    equal, errors = [], []
    for s, level in enumerate(levels):
        name = f"stage{s}.padded."
        if name + "boundary_mask" not in io:
            continue
        valid = io[name + "valid"].astype(bool)
        n = valid.shape[1]
        ours = {key: np.asarray(getattr(level, key))[:, :n] for key in ("boundary", "probability", "valid")}
        equal.append((ours["boundary"] == io[name + "boundary_mask"].astype(bool))[valid].all())
        equal.append((ours["valid"] == valid).all())
        errors.append(float(np.abs(ours["probability"] - io[name + "boundary_prob"])[valid].max()))
    if not equal:
        return {}
    return {"boundaries_equal": bool(np.all(equal)), "max_abs_prob_error": max(errors)}


def _step_error(graph: nnx.GraphDef, params: Any, ids: np.ndarray, mask: np.ndarray, wanted: np.ndarray) -> float:
    """Byte by byte from an empty cache, and after a prefill of half of each row: the larger error."""
    b, t = ids.shape
    lengths = np.maximum(mask.sum(axis=1) // 2, 1).astype(np.int32)

    @jax.jit
    def stepped(params):
        network = nnx.merge(graph, params)
        _, logits = jax.lax.scan(
            lambda cache, x: network.step(x, cache)[::-1], network.empty_cache(b, t), jnp.asarray(ids.T)
        )
        return jnp.swapaxes(logits, 0, 1)

    @jax.jit
    def continued(params):
        network = nnx.merge(graph, params)
        first, cache = network.prefill(jnp.asarray(ids), jnp.asarray(lengths), 2 * t)

        def step(cache, i):
            at = jnp.minimum(lengths + i, t - 1)
            logits, cache = network.step(jnp.take_along_axis(jnp.asarray(ids), at[:, None], 1)[:, 0], cache)
            return cache, logits

        _, rest = jax.lax.scan(step, cache, jnp.arange(t))
        return jnp.concatenate([first[:, None], jnp.swapaxes(rest, 0, 1)], axis=1)

    error = np.abs(np.asarray(stepped(params)) - wanted)[mask].max()
    after = np.asarray(continued(params))
    for row, length, real in zip(range(b), lengths, mask.sum(axis=1)):
        rest = after[row, : real - length + 1] - wanted[row, length - 1 : real]
        error = max(error, np.abs(rest).max())
    return float(error)


def _gradient_error(grads: Any, config: Any, io: Tensors) -> float:
    """Largest error of a gradient, in parts of its tensor's largest entry."""
    ours = hnet.state_dict(jax.tree.map(lambda g: np.asarray(g, np.float64), grads), config)
    wanted = {name.removeprefix("grad."): g for name, g in io.items() if name.startswith("grad.")}
    unknown = wanted.keys() - ours.keys()
    if unknown:
        raise CheckpointError(f"io.safetensors has gradients of unknown tensors: {', '.join(sorted(unknown))}")
    return max(float(np.abs(ours[name] - g).max() / max(np.abs(g).max(), 1e-30)) for name, g in wanted.items())
