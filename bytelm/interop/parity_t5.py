"""Parity cases of ByT5, MrT5 and its pooling baselines: the reference's config and state dict, and in io.safetensors

input_ids [b, t], attention_mask [b, t], labels [b, s] (-100: not scored), and for each mode ("" without a gate, soft.,
hard., hard_thr.) logits [b, s, v], loss; with a gate gate_values [b, t], keep_mask; of hard deletion positions [b, c]
and kept_per_row; soft.gate_loss, soft.total_loss and scores_loss_unscaled (of each mode); grad.<reference name> of the
total loss; greedy ids, here or in meta.json. meta.json: attention_mask_passed (false: the reference saw the padding),
alpha, hard_thr.deletion_threshold.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bytelm.checkpoint import CheckpointError
from bytelm.config import T5Config
from bytelm.interop import t5
from bytelm.interop.parity_hnet import Tensors, need_tensors
from bytelm.interop.published import check_tensors
from bytelm.models.build import structure
from bytelm.models.deletion import mean_gate
from bytelm.models.t5 import Encoded, score_excess
from bytelm.train.losses import token_nll

IGNORED = -100  # label of a position that is not scored
# Of a gate's scale. Golden mrt5_hard_softmax1 with its channels in 20 orders, the same network, is up to 1.34 parts in
# a million of the scale off the reference, and up to 1.7 with one kind of its products in float64: what float32 sums
# leave. The reference itself is 0.94 off the same network in float64.
GATE_ROUNDING = 2e-6


def measure_t5(case: Path, io: Tensors, weights: Tensors) -> dict[str, Any]:
    """Errors of our implementation on a case, over all the modes that it has data for. `gate_limit`: what the largest
    gate error may be."""
    record = json.loads((case / "config.json").read_text(encoding="utf-8"))
    meta = json.loads((case / "meta.json").read_text(encoding="utf-8")) if (case / "meta.json").exists() else {}
    config = t5.config_from(record, f"{case}/config.json", head="lm_head.weight" in weights)
    check_tensors({name: w.shape for name, w in weights.items()}, config, f"{case}/weights.safetensors")
    need_tensors(io, case, "input_ids", "attention_mask", "labels")
    learned = config.deletion.kind == "learned"
    if learned:  # the regulariser is measured; the goldens have no noise
        deletion = dataclasses.replace(config.deletion, noise=False, score_weight=1.0)
        config = dataclasses.replace(config, dropout=0.0, deletion=deletion)
    modes = {prefix: mode for prefix, mode in _modes(config).items() if f"{prefix}logits" in io}
    if not modes:
        raise CheckpointError(f"{case}/io.safetensors: no logits of any mode")
    source, labels = jnp.asarray(io["input_ids"], jnp.int32), jnp.asarray(io["labels"], jnp.int32)
    visible = None if meta.get("attention_mask_passed") is False else jnp.asarray(io["attention_mask"]) > 0
    graph, _ = structure(config)
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), t5.params_from(weights, config))
    inputs = _shift(labels)
    drawn = jnp.asarray(io["sampled_hard_boundaries"], jnp.float32) if "sampled_hard_boundaries" in io else None

    @partial(jax.jit, static_argnames="mode")
    def run(params, mode, threshold):
        network, key = nnx.merge(graph, params), jax.random.key(0) if learned and mode == "soft" else None
        seen = network.look(source, visible, threshold=threshold, key=key)
        encoded, more = network.finish(seen, mode, boundaries=drawn, key=key)
        logits, excess = network.decode(inputs, encoded, key=key)
        return seen, encoded, more, logits, score_excess(config, more["excess"], excess)

    found: dict[str, list[Any]] = {}

    def note(key: str, value: Any) -> None:
        found.setdefault(key, []).append(value)

    for prefix, mode in modes.items():
        threshold = jnp.float32(meta.get(f"{prefix}deletion_threshold", config.deletion.threshold))
        seen, encoded, more, logits, excess = run(params, mode, threshold)
        note("max_abs_logit_error", _worst(logits, io[f"{prefix}logits"]))
        note("loss_error", abs(float(_loss(logits, labels)) - _number(io, f"{prefix}loss")))
        if f"{prefix}scores_loss_unscaled" in io:
            note("loss_error", abs(float(excess) - _number(io, f"{prefix}scores_loss_unscaled")))
        if f"{prefix}gate_values" in io:
            note("max_abs_gate_error", _worst(seen.gate, io[f"{prefix}gate_values"]))
        if f"{prefix}keep_mask" in io:
            kept = seen.gate > threshold
            note("positions_equal", bool((np.asarray(kept) == io[f"{prefix}keep_mask"].astype(bool)).all()))
        if f"{prefix}positions" in io:
            note("positions_equal", _same_positions(encoded, io[f"{prefix}positions"], io[f"{prefix}kept_per_row"]))
        if "hard_boundaries_used" in io:
            note("boundaries_equal", bool((np.asarray(more["boundaries"]) == io["hard_boundaries_used"]).all()))
            note("max_abs_gate_error", _worst(more["boundary_logits"], io["boundary_logits"]))
            note("loss_error", abs(float(more["boundary_loss"]) - _number(io, "loss_boundaries")))
        note("max_abs_step_error", _worst(_stepped(graph, params, inputs, encoded), io[f"{prefix}logits"]))
        name = {"": "greedy", "soft.": "greedy_soft_batch", "hard.": "greedy_hard_batch"}.get(prefix, "")
        wanted = np.asarray(io[name] if name in io else meta.get(name, []))
        if wanted.size:
            note("greedy_equal", bool((_greedy(graph, params, encoded, wanted.shape[1]) == wanted).all()))

    if any(name.startswith("grad.") for name in io):
        alpha = float(meta.get("alpha", 0.0))
        mode = "soft" if config.deletion.gated else "none"

        def total(params):
            network = nnx.merge(graph, params)
            seen = network.look(source, visible)
            logits, _ = network.decode(inputs, network.finish(seen, mode)[0])
            gate = alpha * mean_gate(seen.gate, source) if seen.gate is not None else jnp.zeros(())
            return _loss(logits, labels) + gate, gate

        (value, gate), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
        if "soft.total_loss" in io:
            note("loss_error", abs(float(value) - _number(io, "soft.total_loss")))
            note("loss_error", abs(float(gate) - _number(io, "soft.gate_loss")))
        ours = t5.state_dict(grads, config)
        for name, wanted in ((n.removeprefix("grad."), g) for n, g in io.items() if n.startswith("grad.")):
            if name not in ours:
                raise CheckpointError(f"{case}/io.safetensors: a gradient of an unknown tensor {name}")
            note("max_rel_grad_error", _worst(ours[name], wanted) / max(float(np.abs(wanted).max()), 1e-30))
    if config.deletion.gated:
        found["gate_limit"] = [GATE_ROUNDING * abs(config.deletion.scale)]
    return {key: all(v) if isinstance(v[0], bool) else float(np.max(v)) for key, v in found.items()}  # NaN stays NaN


def _modes(config: T5Config) -> dict[str, str]:
    return {"soft.": "soft", "hard.": "compact", "hard_thr.": "compact"} if config.deletion.gated else {"": "none"}


def _shift(labels: jax.Array) -> jax.Array:
    """Decoder inputs: the labels one place later, behind the start symbol; what is not scored is padding."""
    shifted = jnp.roll(labels, 1, axis=1).at[:, 0].set(0)
    return jnp.where(shifted == IGNORED, 0, shifted)


def _loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    scored = labels != IGNORED
    nll = token_nll(logits, jnp.where(scored, labels, 0))
    return jnp.sum(jnp.where(scored, nll, 0)) / scored.sum()


def _worst(ours: Any, wanted: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours, np.float64) - wanted.reshape(np.shape(ours))).max())


def _number(io: Tensors, name: str) -> float:
    return float(np.asarray(io[name]).ravel()[0])


def _same_positions(encoded: Encoded, wanted: np.ndarray, kept: np.ndarray) -> bool:
    ours = np.asarray(encoded.position)
    return all((ours[i, :n] == wanted[i, :n]).all() and (ours[i, n:] >= ours.shape[1]).all()
               for i, n in enumerate(kept.ravel()))  # fmt: skip


@partial(jax.jit, static_argnums=0)
def _stepped(graph, params, inputs, encoded):
    """Logits after every input, by prefill of the first half and cached steps."""
    network = nnx.merge(graph, params)
    b, t = inputs.shape
    half = max(t // 2, 1)
    whole = [network.prefill(inputs[:, :half], jnp.full(b, n + 1), t, encoded)[0] for n in range(half)]
    _, cache = network.prefill(inputs[:, :half], jnp.full(b, half), t, encoded)
    _, rest = jax.lax.scan(lambda c, x: network.step(x, c)[::-1], cache, inputs[:, half:].T)
    return jnp.concatenate([jnp.stack(whole, axis=1), jnp.swapaxes(rest, 0, 1)], axis=1)


@partial(jax.jit, static_argnums=(0, 3))
def _greedy(graph, params, encoded, length):
    """The likeliest ids one by one, over the whole table, from the start symbol on; padding behind the end."""
    network = nnx.merge(graph, params)
    b = encoded.states.shape[0]
    start = jnp.zeros(b, jnp.int32)
    logits, cache = network.prefill(start[:, None], jnp.ones(b, jnp.int32), length, encoded)

    def one(carry, _):
        logits, cache, ended = carry
        ids = jnp.where(ended, 0, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        logits, cache = network.step(ids, cache)
        return (logits, cache, ended | (ids == 1)), ids

    _, ids = jax.lax.scan(one, (logits, cache, start > 0), length=length - 1)
    return jnp.concatenate([start[:, None], ids.T], axis=1)
