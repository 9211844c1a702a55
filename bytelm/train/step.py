"""The jitted train and evaluation steps."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from bytelm.config import Config
from bytelm.models.base import Level, Network
from bytelm.models.build import Params
from bytelm.models.chunk_metrics import row_need
from bytelm.parallel.mesh import shard, to_spec
from bytelm.parallel.rules import path_string
from bytelm.train.capacity import Capacity, track_need
from bytelm.train.losses import token_nll
from bytelm.train.state import Setup, State

SUMS = ("nll",)  # metrics that microbatches add up to; the others are averaged
DeviceBatch = dict[str, Int[Array, "b t"]]


def cast_matrices(params: Params, dtype: str) -> Params:
    """Projection matrices in the compute type, once per step. The embedding table, convolutions, norms, biases and
    rates stay float32: their gradients are sums over all positions, which bfloat16 cannot hold. So do H-Net's routers
    and residual projections, which compute in float32."""
    if dtype == "float32":
        return params

    def cast(path, p):
        name = path_string(path)
        narrow = name.endswith("kernel") and not any(part in name for part in ("conv", "router", "residual"))
        return p.astype(dtype) if narrow else p

    return jax.tree.map_with_path(cast, params)


def make_train_step(config: Config, setup: Setup) -> Callable[[State, DeviceBatch, Capacity], tuple[State, dict]]:
    """One optimizer step: (state, batch, chunk slots of each level) -> (state, metrics). The state is donated; each
    capacity is compiled once.

    The loss is the mean nats per target over the whole batch plus the mean of the microbatches' auxiliary losses;
    microbatches are summed in float32.
    """
    accum = config.train.grad_accum

    def micro_loss(params, batch, total, capacity):
        network: Network = nnx.merge(setup.graph, cast_matrices(params, config.model.dtype))
        out = network(batch["inputs"], batch["segments"], capacity or None)
        weights = batch["segments"] > 0
        nll = jnp.sum(jnp.where(weights, token_nll(out.logits, batch["targets"]), 0.0)) / total
        needs = jnp.array([row_need(level) for level in out.levels])
        return nll + out.aux_loss / accum, ({"nll": nll, **out.metrics}, needs)

    def step(state: State, batch: DeviceBatch, capacity: Capacity = ()) -> tuple[State, dict]:
        total = jnp.maximum(jnp.sum(batch["segments"] > 0), 1).astype(jnp.float32)
        gradient = jax.grad(partial(micro_loss, capacity=capacity), has_aux=True)
        if accum == 1:
            grads, (metrics, needs) = gradient(state["params"], batch, total)
        else:
            # Row i * accum + j goes to microbatch j, so that every device keeps its own rows.
            micro = {k: shard(v.reshape(-1, accum, v.shape[-1]), "batch", None, None) for k, v in batch.items()}
            micro = jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), micro)

            def add(carry, one):
                grads, (metrics, needs) = gradient(state["params"], one, total)
                return jax.tree.map(jnp.add, carry, (grads, metrics)), needs

            shapes = jax.eval_shape(gradient, state["params"], jax.tree.map(lambda v: v[0], micro), total)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], shapes[1][0]))
            (grads, metrics), needs = jax.lax.scan(add, zeros, micro)
            needs = needs.max(axis=0)
            metrics = {k: v if k in SUMS or k.endswith("/dropped") else v / accum for k, v in metrics.items()}
        updates, opt = setup.optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics |= {"grad_norm": optax.tree.norm(grads), "targets": total}
        new = {"params": params, "opt": opt, "step": state["step"] + 1}
        if "chunks" in state:
            chunks = state["chunks"]
            new["chunks"] = {"need": track_need(chunks["need"], needs), "capacity": chunks["capacity"]}
        return new, metrics

    return jax.jit(step, donate_argnums=0, static_argnums=2, out_shardings=(setup.shardings, None))


def make_eval_step(config: Config, setup: Setup) -> Callable[[Params, Array, Array], tuple[Array, tuple[Level, ...]]]:
    """(params, inputs, targets) -> ln p(target) [b, t] in float32, and the chunking levels; one document per row,
    padding at the end, all the chunk slots that can be needed."""

    def logprobs(params, inputs, targets):
        network = nnx.merge(setup.graph, cast_matrices(params, config.model.dtype))
        out = network(inputs)
        return -token_nll(out.logits, targets), out.levels

    return jax.jit(logprobs)


def place_batch(batch: dict, mesh) -> DeviceBatch:
    """Puts this process's rows of a batch onto the mesh, split over its batch axes."""
    sharding = NamedSharding(mesh, to_spec(("batch", None)))
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
