"""The train state: one nested dict of parameters, optimizer state and step, born sharded."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bytelm.config import Config, T5Config
from bytelm.models.build import init_params, structure
from bytelm.models.deletion import first_control
from bytelm.parallel.rules import state_shardings
from bytelm.train.capacity import first_capacity
from bytelm.train.optim import make_optimizer

# {"params", "opt", "step", "skipped": {"in_row", "total"}}, for models that chunk {"chunks": {"need", "capacity"}}, and
# for a learned delete gate {"deletion": {"alpha", "p", "i"}}, its controller
State = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """Everything about a run's state that is known before a number is allocated."""

    graph: nnx.GraphDef  # the network without weights
    optimizer: optax.GradientTransformation
    abstract: State  # shapes and dtypes, with shardings
    shardings: State
    replicated: NamedSharding  # of what every device holds whole


def plan_state(config: Config, mesh: Mesh) -> Setup:
    """Shapes, shardings and optimizer of a run; allocates nothing."""
    graph, params = structure(config.model)
    optimizer = make_optimizer(config.optim, config.train.steps, params, config.model)
    abstract = jax.eval_shape(lambda: _init(config, optimizer))
    shardings = state_shardings(mesh, abstract)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    return Setup(graph, optimizer, abstract, shardings, NamedSharding(mesh, PartitionSpec()))


def _init(config: Config, optimizer: optax.GradientTransformation) -> State:
    params = init_params(config.model, jax.random.key(config.train.seed))
    zero = jnp.zeros((), jnp.int32)
    state = {"params": params, "opt": optimizer.init(params), "step": zero, "skipped": {"in_row": zero, "total": zero}}
    capacity = first_capacity(config.model, config.data.seq_len)
    if capacity:
        state["chunks"] = {"need": jnp.zeros(len(capacity), jnp.float32), "capacity": jnp.array(capacity, jnp.int32)}
    if isinstance(config.model, T5Config) and config.model.deletion.kind == "learned":
        state["deletion"] = first_control(config.model.deletion)
    return state


def init_state(config: Config, setup: Setup) -> State:
    """A fresh state, each array created on the devices that hold it."""
    return jax.jit(lambda: _init(config, setup.optimizer), out_shardings=setup.shardings)()
