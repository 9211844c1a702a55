"""The jitted train and evaluation steps."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from bytelm.config import Config, T5Config, TokensConfig
from bytelm.data.pipeline import Batch
from bytelm.data.seq2seq import target_length
from bytelm.models.base import Level, Network
from bytelm.models.build import Params, byte_ids, is_marked
from bytelm.models.chunk_metrics import row_need
from bytelm.models.deletion import next_control
from bytelm.models.t5 import Control, Mode
from bytelm.models.t5_report import report_rows
from bytelm.parallel.hosts import place_rows
from bytelm.parallel.mesh import shard
from bytelm.parallel.rules import cast_matrices
from bytelm.train.capacity import Capacity, track_need
from bytelm.train.losses import token_nll
from bytelm.train.optim import held_steps
from bytelm.train.state import Setup, State

SUMS = ("nll", "scored")  # metrics that microbatches add up to; the others are averaged
# What a step is given of a batch: the source for encoder-decoders, marks for models of words or entropy, the bytes of
# each target for models of tokens.
FED = ("inputs", "targets", "segments", "source", "marks", "widths")
DeviceBatch = dict[str, Array]  # FED, each [b, t]; and from several processes "wishes" [b, pieces, 2]: to stop, to save


def fed_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """Shape of each array that a step is given."""
    rows, t = config.data.batch_size, config.data.seq_len
    if is_marked(config.model, config.data):
        return dict.fromkeys((*FED[:3], "marks"), (rows, t))
    if isinstance(config.model, TokensConfig):
        return dict.fromkeys((*FED[:3], "widths"), (rows, t))
    if not isinstance(config.model, T5Config):
        return dict.fromkeys(FED[:3], (rows, t))
    return dict.fromkeys(FED[:3], (rows, target_length(config.data))) | {"source": (rows, t)}


def make_train_step(config: Config, setup: Setup) -> Callable[[State, DeviceBatch, Capacity], tuple[State, dict]]:
    """One optimizer step: (state, batch, slots of each level) -> (state, metrics). The state is donated; each
    capacity is compiled once.

    The loss is the mean nats per target over the whole batch plus the mean of the microbatches' auxiliary losses
    (targets of units that found no slot add nothing, and the loss of the metrics is over the others);
    microbatches are summed in float32. A batch whose loss or gradient is not finite changes nothing but the counts of
    `step` and `skipped`.
    """
    accum, tokens = config.train.grad_accum, isinstance(config.model, TokensConfig)
    end = 0 if tokens else byte_ids(config.model).end
    reads, marked = isinstance(config.model, T5Config), is_marked(config.model, config.data)
    held = held_steps(config.optim, setup.abstract["params"])

    def micro_loss(params, batch, total, control, capacity):
        # What the whole run leaves as it is needs no gradient, nor does what is in front of it alone.
        params = jax.tree.map(lambda p, n: jax.lax.stop_gradient(p) if n >= config.train.steps else p, params, held)
        network: Network = nnx.merge(setup.graph, cast_matrices(params, config.model.dtype))
        more = dict(source=batch["source"], control=control) if reads else dict(marks=batch["marks"]) if marked else {}
        out = network(batch["inputs"], batch["segments"], capacity or None, **more)
        weights = batch["segments"] > 0
        if out.scored is not None:
            weights &= out.scored
        nll = jnp.sum(jnp.where(weights, token_nll(out.logits, batch["targets"]), 0.0)) / total
        needs = jnp.array([row_need(level) for level in out.levels]) if out.need is None else out.need
        scored = jnp.sum(weights) / total
        return nll + out.aux_loss / accum, ({"nll": nll, "scored": scored, **out.metrics}, needs)

    def step(state: State, batch: DeviceBatch, capacity: Capacity = ()) -> tuple[State, dict]:
        total = jnp.maximum(jnp.sum(batch["segments"] > 0), 1).astype(jnp.float32)
        gradient = jax.grad(partial(micro_loss, capacity=capacity), has_aux=True)
        key = jax.random.fold_in(jax.random.key(config.train.seed), state["step"])
        control = _control(config.model, state, key) if isinstance(config.model, T5Config) else None
        if accum == 1:
            grads, (metrics, needs) = gradient(state["params"], batch, total, control)
        else:
            # Row i * accum + j goes to microbatch j, so that every device keeps its own rows.
            micro = {
                k: shard(batch[k].reshape(-1, accum, batch[k].shape[-1]), "batch", None, "length")
                for k in FED
                if k in batch
            }
            micro = jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), micro)

            def add(carry, one):
                one, number = one
                own = None if control is None else replace(control, key=jax.random.fold_in(control.key, number))
                grads, (metrics, needs) = gradient(state["params"], one, total, own)
                return jax.tree.map(jnp.add, carry, (grads, metrics)), needs

            shapes = jax.eval_shape(gradient, state["params"], jax.tree.map(lambda v: v[0], micro), total, control)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], shapes[1][0]))
            (grads, metrics), needs = jax.lax.scan(add, zeros, (micro, jnp.arange(accum)))
            needs = needs.max(axis=0)
            metrics = {k: v if k in SUMS or k.endswith("/dropped") else v / accum for k, v in metrics.items()}
        metrics["nll"] /= jnp.maximum(metrics.pop("scored"), 1e-9)  # of a step that scored all: 1
        updates, opt = setup.optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        norm = optax.tree.norm(grads)
        new = {"params": params, "opt": opt}
        if "chunks" in state:
            chunks = state["chunks"]
            new["chunks"] = {"need": track_need(chunks["need"], needs), "capacity": chunks["capacity"]}
        if isinstance(config.model, T5Config) and "deletion" in state:
            new["deletion"] = next_control(config.model.deletion, state["deletion"], metrics["deletion/rate"],
                                           state["step"])  # fmt: skip
        finite = jnp.isfinite(metrics["nll"]) & jnp.isfinite(norm)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, {part: state[part] for part in new})
        bad = 1 - finite.astype(jnp.int32)
        in_row, in_all = bad * (state["skipped"]["in_row"] + 1), bad + state["skipped"]["total"]
        metrics |= {"grad_norm": norm, "targets": total, "skipped_in_row": in_row, "skipped": in_all}
        valid = batch["segments"] > 0
        if tokens:
            text = jnp.where(valid, batch["widths"], 0)
            metrics["bytes_per_token"] = jnp.sum(text) / total
        else:
            text = batch["source"] > end if reads else valid & (batch["targets"] != end)
        metrics["read"] = jnp.sum(text)  # bytes of text
        if "wishes" in batch:
            metrics["wishes"] = batch["wishes"].any(axis=(0, 1))
        return {**new, "step": state["step"] + 1, "skipped": {"in_row": in_row, "total": in_all}}, metrics

    return jax.jit(step, donate_argnums=0, static_argnums=2, out_shardings=(setup.shardings, setup.replicated),
                   compiler_options=setup.options)  # fmt: skip


def _control(model: T5Config, state: State, key: Array) -> Control:
    """What the step to come is told; in the first `deletion.delay` steps neither regulariser counts."""
    started = (state["step"] >= model.deletion.delay).astype(jnp.float32)
    alpha = state["deletion"]["alpha"] if "deletion" in state else jnp.zeros((), jnp.float32)
    return Control(started * alpha, key, started)


def make_report_step(config: Config, setup: Setup) -> Callable[[Params, DeviceBatch, Mode], dict[str, Array]]:
    """(params, batch, how a gate deletes) -> what `models/t5_report.py` says of each row."""

    def report(params, batch, mode):
        return report_rows(nnx.merge(setup.graph, cast_matrices(params, config.model.dtype)), batch, mode)

    return jax.jit(report, static_argnums=2, out_shardings=setup.replicated,
                   compiler_options=setup.options)  # fmt: skip


def make_eval_step(config: Config, setup: Setup) -> Callable[[Params, Array, Array], tuple[Array, tuple[Level, ...]]]:
    """(params, inputs, targets) -> ln p(target) [b, t] in float32, and the chunking levels; one document per row,
    padding at the end, all the chunk slots that can be needed."""

    def logprobs(params, inputs, targets):
        network = nnx.merge(setup.graph, cast_matrices(params, config.model.dtype))
        out = network(inputs)
        return -token_nll(out.logits, targets), out.levels

    return jax.jit(logprobs, out_shardings=setup.replicated, compiler_options=setup.options)


def place_batch(batch: Batch, mesh: Mesh, mine: Sequence[int] | None = None, rows: int = 0) -> DeviceBatch:
    """Puts what a network needs of a batch onto the mesh, split over its batch axes.

    With several processes, `batch` holds the rows `mine` of `rows`.
    """
    rows = rows or len(batch["inputs"])
    mine = range(rows) if mine is None else mine
    return {k: place_rows(batch[k], mesh, mine, rows) for k in (*FED, "wishes") if k in batch}
