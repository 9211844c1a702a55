"""The device mesh and the one sharding hint that models use."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from bytelm.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "sequence", "tensor")

# Logical axis of an array dimension -> mesh axes that split it. One table for parameters and activations.
LOGICAL_TO_MESH: dict[str | None, tuple[str, ...] | str | None] = {
    "batch": ("data", "fsdp"),
    "length": "sequence",  # positions of a row
    "embed": ("fsdp", "sequence"),  # d_model of a weight matrix
    "heads": "tensor",
    "kv_heads": "tensor",
    "some_heads": "tensor",  # or whole, where it does not divide them (ByT5 small has 6)
    "mlp": "tensor",
    "layers": None,
    "replicated": None,
    None: None,
}


def axes_of(config: MeshConfig) -> tuple[str, ...]:
    """The axes that a mesh has."""
    return tuple(axis for axis in AXES if axis != "sequence" or config.sequence != 1)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """Builds the (data, fsdp, sequence, tensor) mesh over all devices; a size of -1 takes what the others leave.

    Raises ConfigError when the sizes do not multiply to the number of devices. A mesh whose rows stay whole has no
    axis `sequence`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in axes_of(config)}
    fixed = 1
    for size in sizes.values():
        fixed *= max(size, 1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
        fixed = len(devices)
    if fixed != len(devices):
        raise ConfigError(
            f"mesh sizes {', '.join(f'{a}={size}' for a, size in sizes.items())} need {fixed} devices (or a divisor of "
            f"them where one is -1), but {len(devices)} are here: change mesh.* so that they multiply to {len(devices)}"
        )
    axes, shape = tuple(sizes), tuple(sizes.values())
    return Mesh(device_order(shape, devices), axes, axis_types=(AxisType.Auto,) * len(axes))


def device_order(shape: tuple[int, ...], devices: list) -> np.ndarray:
    """The devices in the shape of a mesh whose first axis is `data`: neighbours in a slice are neighbours in it where
    that can be, and an axis takes part of a side of the slice where it must.

    Raises ConfigError where several slices do not divide the first axis.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # TPU slices joined by the slower network of their hosts: copies of the model go across it.
    if shape[0] % slices:
        raise ConfigError(f"mesh.data={shape[0]} on {slices} slices: each holds whole copies of the model, so make "
                          f"it a multiple of {slices}")  # fmt: skip
    within, across = (shape[0] // slices, *shape[1:]), (slices, *(1,) * (len(shape) - 1))
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def check_rows(mesh: Mesh, rows: int, grad_accum: int = 1, name: str = "data.batch_size") -> None:
    """Raises ConfigError unless `rows` divide over the mesh's batch axes and the microbatches."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (ways * grad_accum):
        raise ConfigError(
            f"{name}={rows} cannot be split over data x fsdp = {ways} devices"
            + (f" and train.grad_accum={grad_accum} microbatches" if grad_accum > 1 else "")
            + f": make it a multiple of {ways * grad_accum}"
        )


def to_spec(logical: tuple[str | None, ...], axes: Iterable[str]) -> P:
    """PartitionSpec of a tuple of logical axis names on a mesh that has `axes`."""

    def one(found):
        if not isinstance(found, tuple):
            return found if found in axes else None
        kept = tuple(axis for axis in found if axis in axes)
        return kept if len(kept) > 1 else kept[0] if kept else None

    return P(*(one(LOGICAL_TO_MESH[axis]) for axis in logical))


def ways(entry: Any, mesh: Mapping[str, int]) -> int:
    """Into how many parts an entry of a PartitionSpec cuts a dimension."""
    return math.prod(mesh[axis] for axis in ((entry,) if isinstance(entry, str) else entry or ()))


def named(entry: Any) -> str:
    """The settings behind an entry of a PartitionSpec, for messages: mesh.fsdp x mesh.sequence."""
    return " x ".join(f"mesh.{axis}" for axis in ((entry,) if isinstance(entry, str) else entry))


def platform() -> str:
    """What the mesh's devices are ("cpu", "gpu", "tpu"), also of those that are not here but compiled for; without a
    mesh, jax's default."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    found = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if found in ("cuda", "rocm") else found


def one_device() -> bool:
    """Whether the mesh has one device, or there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def _cpus(mesh: Any) -> bool:
    """Whether the devices of a mesh are several of a CPU.

    There, XLA (as of jaxlib 0.10.2) keeps collectives in order but for those inside a loop: what follows the loop may
    begin before they have. Those of `parallel/sequence.py` all bear one number, so that devices meet in different ones:
    wrong numbers or a crash. Those that the compiler makes have numbers of their own, and need threads enough to wait
    in (`xla_flags.py`).
    """
    device = getattr(mesh, "abstract_device", None)
    return mesh.size > 1 and getattr(device, "platform", None) == "cpu"


def unroll() -> bool | int:
    """`unroll` of a scan whose turns hold collectives, see `_cpus`."""
    return True if _cpus(jax.sharding.get_abstract_mesh()) else 1


def compiler_options(mesh: Mesh | None) -> dict[str, bool]:
    """What `jax.jit` must tell the compiler of a program that runs over this mesh: threads that share a product would
    wait for such as wait in collectives, see `_cpus`."""
    return {"xla_cpu_multi_thread_eigen": False} if mesh is not None and _cpus(mesh.abstract_mesh) else {}


def shard(x: Array, *logical: str | None) -> Array:
    """Asks the compiler to lay out `x` by logical axes; without a mesh it returns `x` as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, to_spec(logical, mesh.axis_names))
