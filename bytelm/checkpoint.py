"""Checkpoints of a run, by orbax: asynchronous, atomic, kept by count and period, restored onto any mesh.

A run directory holds checkpoints/STEP (weights, optimizer state, data position, config) and best/STEP (weights with the
lowest held-out bits per byte, and their config).
"""

import contextlib
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from bytelm.codec import from_dict, to_dict
from bytelm.config import CheckpointConfig, Config, ConfigError
from bytelm.parallel.hosts import barrier, gather, is_first, several


class CheckpointError(ValueError):
    """A checkpoint that is missing or cannot be read; shown without a traceback."""


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, run_dir: Path, options: CheckpointConfig):
        """Every process of a run makes one, and calls its methods at the same points."""
        self.folder, self.best_folder = run_dir / "checkpoints", run_dir / "best"
        if is_first():
            for left_over in run_dir.glob("*/*.orbax-checkpoint-tmp*"):  # of a process that was killed while saving
                shutil.rmtree(left_over, ignore_errors=True)
        barrier("left-over checkpoints removed")
        for noisy in (
            "asyncio",
            "absl",
        ):  # of a save that fails, every array logs a traceback; one error is raised to us
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        self._manager = _manager(self.folder, options.keep, options.keep_every or None)
        self._best = _manager(self.best_folder, 1) if options.best else None

    def save(self, step: int, state: Any, data: dict, meta: dict, wait: bool = False) -> None:
        """Saves a train state; returns once the arrays are copied, unless `wait`. Raises CheckpointError when the disk
        is full or the folder cannot be written; earlier checkpoints stand."""
        rest = {k: v for k, v in state.items() if k != "params"}
        with _saving(self.folder):
            self._one_at_a_time(self._best)
            _check_space(self.folder, state)
            meta = {**meta, "checksums": checksums(state)}
            if step not in self._manager.all_steps():
                self._manager.save(step, args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state["params"]), rest=ocp.args.StandardSave(rest),
                    data=ocp.args.JsonSave(data), meta=ocp.args.JsonSave(meta)), force=True)  # fmt: skip
            if wait:
                self._manager.wait_until_finished()

    def save_best(self, step: int, params: Any, meta: dict) -> None:
        """Keeps these weights as the best so far, if checkpoint.best is on."""
        if self._best is not None:
            if step in self._best.all_steps():
                self._best.delete(step)
            with _saving(self.best_folder):
                self._one_at_a_time(self._manager)
                _check_space(self.best_folder, params)
                self._best.save(step, args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta)), force=True)  # fmt: skip

    def _one_at_a_time(self, other: ocp.CheckpointManager | None) -> None:
        """With several processes, waits for what is being saved elsewhere: threads of two saves at once would meet at
        each other's barriers in another order in every process, and wait for ever."""
        if other is not None and several():
            other.wait_until_finished()

    def leave_diverged(self, first_bad: int) -> str:
        """Sets aside the checkpoint whose weights gave a loss that is not finite at step `first_bad`, if there is one
        before it to go back to; says what is there, for a message."""
        self.wait()
        bad = [step for step in self.steps() if step >= first_bad - 1]
        good = [step for step in self.steps() if step < first_bad - 1]
        if bad and not good:
            return f"the weights of the only checkpoint, step {bad[0]}, gave it: start again with other settings"
        for step in bad:
            self._set_aside(step, "has weights that gave a loss that is not finite", "diverged")
        return f"the checkpoint of step {good[-1]} is intact" if good else "no checkpoint had been saved yet"

    def steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def restore(self, abstract: Any) -> tuple[Any, dict, dict] | None:
        """The newest readable (state, data, meta), laid out as `abstract` says; None when there is no checkpoint. Its
        record of slots, `chunks`, is as it was saved: there, or not.

        One that cannot be read is reported, and moved to broken-STEP once an older one could be read. Raises
        CheckpointError when there are checkpoints but none can be read.
        """
        rest = {k: v for k, v in abstract.items() if k != "params"}
        broken: list[tuple[int, str]] = []
        for step in reversed(self.steps()):
            saved, reason = None, ""
            try:
                saved = self._read(step, ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract["params"]),
                    rest=ocp.args.StandardRestore(self._slots_as_saved(step, rest)),
                    data=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore()))  # fmt: skip
                if not (isinstance(saved["data"], dict) and isinstance(saved["meta"], dict)):
                    raise CheckpointError("its data or meta record is not a mapping")
                wanted = saved["meta"].pop("checksums", None)
                if wanted is not None and checksums({"params": saved["params"], **saved["rest"]}) != wanted:
                    raise CheckpointError("its arrays are not those that were saved")
            except Exception as e:  # orbax and tensorstore raise many kinds for a damaged file
                reason = _reason(e)
            reasons = [said for said in gather(reason) if said]  # another process may have met what this one did not
            if saved is None or reasons:
                broken.append((step, reasons[0]))
                continue
            for bad, reason in broken:
                self._set_aside(bad, f"cannot be read ({reason})")
            if self._best is not None:
                for later in [s for s in self._best.all_steps() if s > step]:
                    self._best.delete(later)  # of a future that will now be another
            return {"params": saved["params"], **saved["rest"]}, saved["data"], saved["meta"]
        if broken:
            raise CheckpointError(
                f"{self.folder}: none of its checkpoints can be read: "
                + "; ".join(f"step {step}: {reason}" for step, reason in broken)
                + ". Remove the folder, or name another train.run_dir, to start afresh"
            )
        return None

    def _read(self, step: int, items: ocp.args.Composite) -> Any:
        """What a checkpoint holds. Of several processes each reads on its own: one that meets a damaged file must not
        leave the others waiting at a barrier."""
        if not several():
            return self._manager.restore(step, args=items)
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"reader{me}"
        )
        handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            return reader.restore((self.folder / str(step)).resolve(), args=items)

    def _slots_as_saved(self, step: int, rest: Any) -> Any:
        """What to read of a state: `rest`, but with a record of slots just where this checkpoint has one. Settings
        that a run may change decide whether slots are chosen."""
        with ocp.StandardCheckpointer() as reader:
            saved = reader.metadata((self.folder / str(step) / "rest").resolve()).item_metadata
        if "chunks" not in saved:
            return {name: part for name, part in rest.items() if name != "chunks"}
        everywhere = rest["step"].sharding
        slots = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere) for name, x in saved["chunks"].items()
        }
        return {"chunks": slots} | rest

    def _set_aside(self, step: int, reason: str, name: str = "broken") -> None:
        if is_first():
            target = self.folder / f"{name}-{step}"
            print(f"[checkpoint] {self.folder / str(step)} {reason}; moved to {target.name}, the one before it counts",
                  file=sys.stderr, flush=True)  # fmt: skip
            shutil.rmtree(target, ignore_errors=True)
            (self.folder / str(step)).rename(target)
        barrier(f"checkpoint {step} set aside")
        self._manager.reload()

    def wait(self) -> None:
        """Returns when everything saved is on disk. Raises CheckpointError when it could not be written."""
        for folder, manager in ((self.folder, self._manager), (self.best_folder, self._best)):
            if manager is not None:
                with _saving(folder):
                    manager.wait_until_finished()

    def close(self) -> None:
        for manager in filter(None, (self._manager, self._best)):
            with contextlib.suppress(Exception):  # a failed background save was reported when it was waited for
                manager.close()


def _reason(error: Exception) -> str:
    """The first line of what a library said."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _manager(folder: Path, keep: int, period: int | None = None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=period, create=True)
    return ocp.CheckpointManager(folder.resolve(), options=options)


def checksums(state: Any) -> dict[str, int]:
    """A number for each array that another one in its place would not have, by path: sums of its bits, weighted by
    place, modulo 2^32. Arrays read back from a damaged file may be well-formed and wrong.

    Summed on the devices that hold them, or by numpy where that is this process's own memory: nothing to compile."""
    leaves, tree = jax.tree.flatten(state)
    on_host = all(x.is_fully_addressable and all(d.platform == "cpu" for d in x.devices()) for x in leaves)
    sums = [_host_sum(np.asarray(x)) for x in leaves] if on_host else jax.device_get(_device_sums(leaves))
    paths = jax.tree.leaves_with_path(jax.tree.unflatten(tree, sums))
    return {jax.tree_util.keystr(p, simple=True, separator="/"): int(v) for p, v in paths}


_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes of an entry
_STRIDE = 2654435761  # place i counts 1 + i * _STRIDE


def _host_sum(x: np.ndarray, block: int = 1 << 20) -> int:
    bits = np.ascontiguousarray(x).reshape(-1).view(_BITS[x.dtype.itemsize])
    places = np.arange(min(block, bits.size), dtype=np.uint32) * np.uint32(_STRIDE) + np.uint32(1)
    total = 0
    for first in range(0, bits.size, block):
        part = bits[first : first + block].astype(np.uint32)
        here = places[: part.size] + np.uint32(first * _STRIDE % 2**32)
        total += int(np.sum(part * here, dtype=np.uint32))
    return total % 2**32


@jax.jit
def _device_sums(leaves: list[jax.Array]) -> list[jax.Array]:
    def one(x):
        bits = jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize])
        place, stride = jnp.ones(x.shape, jnp.uint32), 1
        for axis in reversed(range(x.ndim)):  # not flattened, so that every device sums what it has
            place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(_STRIDE * stride % 2**32)
            stride *= x.shape[axis]
        return jnp.sum(bits.astype(jnp.uint32) * place, dtype=jnp.uint32)

    return [one(x) for x in leaves]


def _check_space(folder: Path, tree: Any) -> None:
    """Raises OSError when the disk has no room for the arrays, before anything is written: a save that fails half-way
    is as safe, but tensorstore then prints a page for every array."""
    needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"it takes {needed / 1e9:,.2f} GB, the disk has {free / 1e9:,.2f} GB free")


@contextlib.contextmanager
def _saving(folder: Path):
    try:
        yield
    except (OSError, ValueError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and several():  # most likely another process is gone
            raise
        raise CheckpointError(
            f"{folder}: the checkpoint could not be written: {_reason(e)}. Earlier ones stand."
        ) from e


def list_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir())


def read_meta(step_folder: Path) -> dict:
    """The meta record of one checkpoint. Raises CheckpointError when it cannot be read."""
    try:
        meta = json.loads((step_folder / "meta" / "metadata").read_text(encoding="utf-8"))
        if not isinstance(meta, dict):
            raise ValueError("its meta record is not a mapping")
        return meta
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{step_folder}: not a readable bytelm checkpoint: {e}") from None


def find_checkpoint(run_dir: Path, which: str = "latest") -> Path:
    """Folder of the checkpoint `latest`, `best`, or a step number. Raises CheckpointError naming what there is."""
    steps, best = list_steps(run_dir / "checkpoints"), list_steps(run_dir / "best")
    if which == "best" and best:
        return run_dir / "best" / str(best[-1])
    if which == "latest" and steps:
        return run_dir / "checkpoints" / str(steps[-1])
    if which in map(str, steps):
        return run_dir / "checkpoints" / which
    there = ", ".join([*map(str, steps), *(["best"] if best else [])]) or "none"
    raise CheckpointError(f"{run_dir}: no checkpoint {which!r}; there is: {there}")


def restore_params(step_folder: Path, abstract: Any) -> Any:
    """The weights of one checkpoint, laid out (and cast) as `abstract` says. Raises CheckpointError."""
    manager = ocp.Checkpointer(ocp.StandardCheckpointHandler())
    try:
        return manager.restore(step_folder.resolve() / "params", args=ocp.args.StandardRestore(abstract))
    except Exception as e:  # orbax and tensorstore raise many kinds for a damaged file
        raise CheckpointError(f"{step_folder}: the weights cannot be read: {_reason(e)}") from None
    finally:
        manager.close()


def stored_config(meta: dict, where: str) -> Config:
    """The config in a checkpoint's meta record. Raises ConfigError when this version cannot read it."""
    try:
        return from_dict(Config, meta["config"])
    except (ConfigError, KeyError) as e:
        raise ConfigError(f"{where}: its stored config is not one this version of bytelm reads: {e}") from None


# Settings that do not change what a run computes (beyond rounding), or only for how long.
FREE_ON_RESUME = (
    "mesh", "hosts", "eval", "checkpoint", "data.workers", "data.prefetch", "data.cache_dir", "data.marks",
    "model.stack.attention",
    "model.stack.scan_layers", "model.stack.remat", "model.stack.ssm.chunk", "model.stack.ssm.form", "train.run_dir",
    "train.steps", "train.log_every", "train.init_from", "train.patcher", "train.backbone", "train.allow_config_change",
    "train.compilation_cache",
    "model.attention", "model.scan_layers", "model.remat", "model.ssm.chunk", "model.ssm.form", "train.watch_text",
    "train.max_skipped", "train.profile_start", "train.profile_steps", "train.tensorboard", "train.wandb_project",
)  # fmt: skip


def blocking_changes(changes: list[str]) -> list[str]:
    """Those of `codec.differences` that a resumed run must not have."""
    return [c for c in changes if not any((c.split(":")[0] + ".").startswith(free + ".") for free in FREE_ON_RESUME)]


FORMAT = "bytelm-checkpoint-2"  # 1 had no count of skipped batches


def make_meta(config: Config, step: int, **more: Any) -> dict:
    """The record saved beside a checkpoint."""
    return {"format": FORMAT, "step": step, "config": to_dict(config), **more}
