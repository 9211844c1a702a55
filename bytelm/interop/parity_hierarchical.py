"""Parity cases of HAT, SpaceByte, MegaByte and BLT: the reference's config (wrapped in `config`, or BLT's config.json)
and state dict, and in io.safetensors tokens [b, t], logits [b, t, v]; HAT: n_bytes, word_ids [b, t] (-1: padding);
SpaceByte and MegaByte: targets, loss (mean nats), and where patches begin: global_ts [b, c], global_T (how many); BLT:
the same as begins [b, t].

HAT's cached steps are compared with our own forward pass, both with strict guides: the reference's guide knows a word's
first character before it is whole.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bytelm.config import HATConfig
from bytelm.data.word_rule import START
from bytelm.data.words import marks as word_marks
from bytelm.interop import hierarchical
from bytelm.interop.parity_hnet import Tensors, need_tensors
from bytelm.interop.published import check_hierarchical
from bytelm.models.build import structure
from bytelm.train.losses import token_nll


def measure_hierarchical(case: Path, io: Tensors, weights: Tensors) -> tuple[str, dict[str, Any]]:
    """The family, and the errors of our implementation on a case."""
    record = json.loads((case / "config.json").read_text(encoding="utf-8"))
    config = hierarchical.config_from(record, f"{case}/config.json")
    check_hierarchical(weights, config, f"{case}/weights.safetensors")
    need_tensors(io, case, "tokens", "logits")
    graph, _ = structure(config)
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), hierarchical.params_from(weights, config))
    tokens = jnp.asarray(io["tokens"], jnp.int32)
    b, t = tokens.shape
    lengths = io["n_bytes"].ravel() if "n_bytes" in io else np.full(b, t)
    real = np.arange(t) < lengths[:, None]

    @jax.jit
    def forward(params, marks):
        out = nnx.merge(graph, params)(tokens, None, None, marks)
        return out.logits, out.levels[0].boundary, token_nll(out.logits, jnp.asarray(io.get("targets", tokens)))

    found: dict[str, Any] = {}
    marks = None
    if isinstance(config, HATConfig):
        need_tensors(io, case, "word_ids", "n_bytes")
        marks, begins = np.zeros((b, t), np.int32), (np.diff(io["word_ids"], axis=1, prepend=-1) > 0) & real
        for row, n, out in zip(io["tokens"], lengths, marks):
            out[:n] = word_marks(row[:n].astype(np.uint8).tobytes(), config.rule, config.max_word)
        found["boundaries_equal"] = bool((((marks & START) > 0) == begins).all())
        marks = jnp.asarray(begins.astype(np.int32) * START)
    logits, boundary, nll = forward(params, marks)
    found["max_abs_logit_error"] = float(np.abs(np.asarray(logits, np.float64) - io["logits"])[real].max())
    if "global_ts" in io:
        wanted = np.zeros((b, t), bool)
        for row, at, n in zip(wanted, io["global_ts"], io["global_T"].ravel()):
            row[at[:n]] = True
        found["boundaries_equal"] = bool((np.asarray(boundary) == wanted).all())
    if "begins" in io:
        found["boundaries_equal"] = bool((np.asarray(boundary) == (io["begins"] > 0)).all())
    if "loss" in io:
        need_tensors(io, case, "targets")
        found["loss_error"] = abs(float(np.mean(np.asarray(nll, np.float64))) - float(io["loss"].ravel()[0]))
    full = np.asarray(forward(params, None)[0]) if isinstance(config, HATConfig) else io["logits"]
    errors = []
    for begin in (0, max(t // 2, 1)):
        shown = real & (np.arange(t) >= begin - 1)
        errors.append(np.abs(_stepped(graph, params, tokens, begin) - full)[shown].max(initial=0))
    found["max_abs_step_error"] = float(np.max(errors))
    return config.family, found


def _stepped(graph: nnx.GraphDef, params: Any, tokens: jax.Array, begin: int) -> np.ndarray:
    """Logits after every input from `begin` - 1 on (zeros before): cached steps from nothing, or behind a prefill."""
    b, t = tokens.shape

    @jax.jit
    def run(params):
        network = nnx.merge(graph, params)
        if begin:
            first, cache = network.prefill(tokens[:, :begin], jnp.full(b, begin), t)
        else:
            first, cache = None, network.empty_cache(b, t)
        _, rest = jax.lax.scan(lambda c, x: network.step(x, c)[::-1], cache, tokens[:, begin:].T)
        rest = jnp.swapaxes(rest, 0, 1)
        return rest if first is None else jnp.concatenate([first[:, None], rest], axis=1)

    out = np.asarray(run(params))
    return np.pad(out, ((0, 0), (t - out.shape[1], 0), (0, 0)))
