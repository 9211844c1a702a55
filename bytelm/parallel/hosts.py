"""Several processes, one for each host, as one run: start-up, which rows are whose, and agreeing on things.

With one process everything here is a no-op or the identity.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from bytelm.config import ConfigError, HostsConfig
from bytelm.parallel.mesh import to_spec

# Set by launchers for each of several tasks; SLURM_NTASKS alone is also set in a job's own script, outside srun.
_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def start(config: HostsConfig) -> None:
    """Joins the other processes, if there are any; returns once all are there. Must come before jax looks for devices.

    In this order: `config`; the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID; the cluster, as
    far as jax knows it (config.cluster). Raises ConfigError when a part is missing or the others cannot be reached.
    """
    if jax.distributed.is_initialized():
        return
    coordinator = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    processes = config.processes or _number("JAX_NUM_PROCESSES", 0)
    process = config.process if config.process >= 0 else _number("JAX_PROCESS_ID", -1)
    options: dict[str, Any] = {}
    if config.process >= 0 and not coordinator:
        raise ConfigError(f"hosts.process={config.process}: name the coordinator and the number of processes as well")
    if coordinator or processes > 1:
        if not coordinator or processes < 1 or not 0 <= process < processes:
            raise ConfigError(
                f"hosts.coordinator={coordinator!r}, hosts.processes={processes}, hosts.process={process}: give "
                "host:port, a number of processes, and which of them this is (0 and up); or JAX_COORDINATOR_ADDRESS, "
                "JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            )
        if processes == 1:
            return
        options = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    elif not (config.cluster == "on" or (config.cluster == "auto" and _in_cluster())):
        return
    if options:
        print(f"[hosts] process {process} of {processes}: waiting for the others at {coordinator}, for "
              f"{config.start_seconds} s at most", file=sys.stderr, flush=True)  # fmt: skip
        if process:  # jax would end the process with a C++ stack when nobody answers
            _wait_for(coordinator, config.start_seconds)
    global _joined
    try:
        jax.distributed.initialize(
            **options,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            initialization_timeout=config.start_seconds,
            cluster_detection_method="deactivate" if options else None,
        )
    except (RuntimeError, ValueError) as e:
        raise ConfigError(
            f"hosts: process {process if options else ''} of {processes if options else 'the cluster'} could not "
            f"join the others: {str(e).splitlines()[0] if str(e) else type(e).__name__}"
        ) from None
    _joined = jax.process_count() > 1


def _wait_for(coordinator: str, seconds: int) -> None:
    """Returns once somebody listens at host:port. Raises ConfigError when nobody does in time."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"hosts.coordinator={coordinator!r}: must be host:port")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as e:
            if time.monotonic() > end:
                raise ConfigError(
                    f"hosts.coordinator={coordinator}: process 0 did not answer in {seconds} s ({e}); is it started, "
                    "and can this host reach it?"
                ) from None
            time.sleep(0.2)


def _in_cluster() -> bool:
    several = any(_number(name, 1) > 1 for name in _TASKS)
    return several or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    if value and not value.lstrip("-").isdecimal():
        raise ConfigError(f"{name}={value!r}: must be a whole number")
    return int(value) if value else default


_joined = False  # whether this process found the others


class Lost(RuntimeError):
    """Another process of the run is gone (exit status 1: start all again)."""


def several() -> bool:
    """Whether this is one of several processes."""
    return _joined


def leave(why: str, status: int) -> NoReturn:
    """Ends this process at once, without waiting for the others, which then end as well."""
    print(f"bytelm: process {jax.process_index()} of {jax.process_count()} ends with status {status}: {why}",
          file=sys.stderr, flush=True)  # fmt: skip
    os._exit(status)


def is_first() -> bool:
    """Whether this process writes what one process writes: logs, config, plots."""
    return jax.process_index() == 0


def rows_here(mesh: Mesh, rows: int) -> list[int]:
    """Which rows of a batch of `rows` this process must feed: those that lie on its devices, whole or in pieces.

    Raises ConfigError when a piece lies on devices of several processes.
    """
    cut = mesh.shape.get("sequence", 1)
    owners: dict[tuple[int, int], set[int]] = {}
    layout = NamedSharding(mesh, to_spec(("batch", "length"), mesh.axis_names))
    for device, (some, pieces) in layout.devices_indices_map((rows, cut)).items():
        for row in range(*some.indices(rows)):
            for piece in range(*pieces.indices(cut)):
                owners.setdefault((row, piece), set()).add(device.process_index)
    if any(len(owner) > 1 for owner in owners.values()):
        raise ConfigError(
            f"mesh.tensor={mesh.shape['tensor']} spreads a row over several processes: choose one that divides the "
            f"{jax.local_device_count()} devices of a process"
        )
    return sorted({row for (row, _), owner in owners.items() if jax.process_index() in owner})


def place_rows(local: np.ndarray, mesh: Mesh, mine: Sequence[int], rows: int) -> Array:
    """An array [rows, t, ...] split over the mesh's batch axes and, where rows are cut, along t; given the rows of this
    process (`rows_here`)."""
    sharding = NamedSharding(mesh, to_spec(("batch", "length", *(None,) * (local.ndim - 2)), mesh.axis_names))
    if jax.process_count() == 1:
        return jax.device_put(local, sharding)
    where = {row: i for i, row in enumerate(mine)}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        return local[[where[row] for row in range(*index[0].indices(rows))]][:, *index[1:]]

    return jax.make_array_from_callback((rows, *local.shape[1:]), sharding, part)


def place(whole: np.ndarray, sharding: NamedSharding) -> Array:
    """An array laid out by `sharding`; every process holds the same whole one."""
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def gather(value: Any) -> list[Any]:
    """What each process passed in, in their order; plain JSON. Every process must call it at the same point."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([len(data)], np.int32))).reshape(-1)
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)  # few sizes: each is compiled once
    padded[: len(data)] = data
    every = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(bytes(row[:size])) for row, size in zip(every, sizes)]


def barrier(name: str) -> None:
    """Returns once every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
