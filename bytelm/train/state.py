"""The train state: one nested dict of parameters, optimizer state and step, born sharded."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bytelm.config import Config, ConfigError, FlatConfig, HNetConfig, T5Config
from bytelm.kernels import check_kernels
from bytelm.models.build import init_params, structure
from bytelm.models.deletion import first_control
from bytelm.parallel.mesh import compiler_options, platform
from bytelm.parallel.rules import state_shardings
from bytelm.train.capacity import first_capacity
from bytelm.train.optim import make_optimizer
from bytelm.windows import DEFAULT_WINDOW

# {"params", "opt", "step", "skipped": {"in_row", "total"}}; where slots are chosen {"chunks": {"need", "capacity"}};
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
    options: dict[str, bool]  # what the compiler is told


def plan_state(config: Config, mesh: Mesh) -> Setup:
    """Shapes, shardings and optimizer of a run; allocates nothing. Raises ConfigError where the mesh does not suit."""
    check_pieces(config, mesh.shape.get("sequence", 1))
    with jax.set_mesh(mesh):
        check_kernels(config.model, platform())
    graph, params = structure(config.model)
    optimizer = make_optimizer(config.optim, config.train.steps, params, config.model)
    abstract = jax.eval_shape(lambda: _init(config, optimizer))
    shardings = state_shardings(mesh, abstract)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    replicated = NamedSharding(mesh, PartitionSpec())
    return Setup(graph, optimizer, abstract, shardings, replicated, compiler_options(mesh))


def check_pieces(config: Config, count: int) -> None:
    """Raises ConfigError where this config's rows cannot be cut into `count` pieces."""
    model = config.model
    if count == 1:
        return
    if not isinstance(model, FlatConfig | HNetConfig) or (isinstance(model, HNetConfig) and model.chunker != "learned"):
        raise ConfigError(f"mesh.sequence={count}: only flat models and H-Nets with learned chunks have rows in pieces")
    kernel = (model.stack if isinstance(model, FlatConfig) else model).attention
    if kernel in ("cudnn", "splash"):
        raise ConfigError(f"mesh.sequence={count}: attention={kernel} reads whole rows; use auto or xla")
    row = config.data.seq_len
    lengths = {"data.seq_len": row, "eval.window": config.eval.window or min(row, DEFAULT_WINDOW)}
    if isinstance(model, HNetConfig):
        lengths["model.capacity.multiple"] = model.capacity.multiple
    for name, length in lengths.items():
        if length % count:
            raise ConfigError(f"{name}={length} cannot be cut into mesh.sequence={count} equal pieces")


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
    init = jax.jit(
        lambda: _init(config, setup.optimizer), out_shardings=setup.shardings, compiler_options=setup.options
    )
    return init()
