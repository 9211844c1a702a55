"""A whole training run on one page: `train(config)`."""

import contextlib
import dataclasses
import fcntl
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from bytelm.byteview.tokenizer_files import tokenizer_hash
from bytelm.checkpoint import (
    FORMAT,
    CheckpointError,
    Checkpoints,
    blocking_changes,
    make_meta,
    read_meta,
    stored_config,
)
from bytelm.codec import differences, dumps, to_dict
from bytelm.config import Config, ConfigError, HostsConfig, T5Config, TokensConfig
from bytelm.data.pipeline import Batches, join_states, load_text
from bytelm.data.readers import DataError
from bytelm.data.seq2seq import target_length
from bytelm.data.sources import cache_folder
from bytelm.devices import measured_matmul_rate
from bytelm.evals.bpb import BitsPerByte
from bytelm.evals.chunk_history import ChunkHistory
from bytelm.evals.seq2seq import TargetScore
from bytelm.metrics import MetricsLog, git_commit, plot_losses, versions
from bytelm.models.build import byte_ids, count_parameters
from bytelm.models.flops import TRAIN_FACTOR, forward_flops, t5_flops, trained_kept
from bytelm.parallel import hosts
from bytelm.parallel.mesh import check_rows, make_mesh
from bytelm.parallel.rules import path_string
from bytelm.train.capacity import Capacity, next_capacity, resumed_capacity, time_to_choose, with_capacity
from bytelm.train.evaluation import make_evaluation
from bytelm.train.health import Diverged, Health, with_bits
from bytelm.train.init import load_initial_params, load_parts, with_parts
from bytelm.train.patches import text_marks
from bytelm.train.progress import Progress, amount, clock
from bytelm.train.signals import stop_on_signal
from bytelm.train.speed import Speed
from bytelm.train.state import init_state, plan_state
from bytelm.train.step import make_train_step, place_batch
from bytelm.train.tokens import open_tokenizer, text_tokens

__all__ = ["Diverged", "Interrupted", "Result", "train"]


class Interrupted(Exception):
    """The run was asked to stop, has saved, and can go on (exit status 75)."""


@dataclass(frozen=True)
class Result:
    """Where a finished run lies and how well it did."""

    run_dir: Path
    step: int
    heldout: BitsPerByte | TargetScore | None
    best_bpb: float | None
    seconds: float  # training and evaluation of this process, compilation included


def train(config: Config) -> Result:
    """Trains to config.train.steps: resumes from run_dir where it can, else starts from init_from, else from scratch.

    Raises ConfigError, DataError or CheckpointError for what the user can mend, Interrupted after SIGTERM or SIGINT
    (saved), Diverged after train.max_skipped batches in a row whose loss is not finite.
    """
    began = time.monotonic()
    config = with_parts(config)
    hosts.start(config.hosts)
    enable_compilation_cache(config)
    run_dir = Path(config.train.run_dir).expanduser()
    mesh = make_mesh(config.mesh)
    check_rows(mesh, config.data.batch_size, config.train.grad_accum)
    check_rows(mesh, config.eval.batch_size or config.data.batch_size, name="eval.batch_size")
    ids = None if isinstance(config.model, TokensConfig) else byte_ids(config.model, config.data.reserved)
    sources, heldout_text = load_text(config.data)
    mine, several, first = hosts.rows_here(mesh, config.data.batch_size), hosts.several(), hosts.is_first()
    matmul_rate = measured_matmul_rate(config.model.dtype)  # outside the mesh: of one device, and of this process
    progress = Progress(config.train.steps, quiet=not first)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_own(run_dir, first))
        checkpoints = Checkpoints(run_dir, config.checkpoint)
        stack.callback(checkpoints.close)
        stack.enter_context(jax.set_mesh(mesh))
        setup = plan_state(config, mesh)
        saved, fitted = _resume(config, checkpoints, setup.abstract, progress), {}
        if saved:
            state, data_state, meta = saved
        else:
            state, data_state, meta = init_state(config, setup), None, {}
            fresh = [path_string(path) for path, _ in jax.tree.leaves_with_path(state["params"])]
            if config.train.init_from:
                state["params"], fresh = load_initial_params(
                    config.train.init_from, setup.abstract["params"], state["params"]
                )
                new = f"; new: {', '.join(fresh)}" if fresh else ""
                progress.note(f"weights from {config.train.init_from}{new}")
            state["params"], fitted = load_parts(config, setup.abstract["params"], state["params"], fresh, sources)
            if fitted:
                progress.note("word reader: " + ", ".join(f"{name} {value:.3g}" for name, value in fitted.items()))
        step, best = int(state["step"]), meta.get("best_bpb")
        tokenizer, belongs = None, {}
        if ids is None:
            begun = meta.get("tokenizer", "of no checkpoint") if saved else None
            tokenizer = open_tokenizer(config, run_dir, sources, begun, progress.note)
            belongs = {"tokenizer": tokenizer_hash(tokenizer.path)}
        if meta.get("best_over") != _best_over(config):  # evaluations of other text or size do not compare
            best = None
        marks = text_marks(config, sources, state["params"], setup.replicated, progress.note)
        tokens = text_tokens(tokenizer, sources, config.data.cache_dir, progress.note) if tokenizer else ()
        recut = tokenizer.recut(config.data) if tokenizer else None
        batches = Batches(sources, config.data, ids, seed=config.train.seed, state=data_state, rows=mine, marks=marks,
                          tokens=tokens, recut=recut)  # fmt: skip
        stack.callback(batches.close)

        log = MetricsLog(run_dir, step, config.train.tensorboard, config.train.wandb_project, writes=first)
        stack.callback(log.close)
        if first:
            _write_config(config, run_dir)
        _print_start(config, progress, mesh, sources, heldout_text, count_parameters(setup.abstract["params"]), step)
        health = Health(config.train.max_skipped, batches.where, partial(_skipped, log, progress),
                        checkpoints.leave_diverged, seen=meta.get("bytes", 0))  # fmt: skip
        speed = Speed(config, mesh.size, step, health.seen, matmul_rate)
        commit = git_commit()
        log.write({"step": step, "event": "start", "seed": config.train.seed, "commit": commit,
                   "versions": versions(), "device": speed.device, "devices": mesh.size,
                   "processes": jax.process_count(), "parameters": count_parameters(setup.abstract["params"]),
                   "train_flops_per_byte": TRAIN_FACTOR * forward_cost(config, {}),
                   "matmul_flops_per_second": speed.measured, **fitted})  # fmt: skip

        train_step = make_train_step(config, setup)
        evaluation = make_evaluation(config, mesh, setup, heldout_text, tokenizer)
        stop = stack.enter_context(stop_on_signal())
        profile = stack.enter_context(_profiler(config, run_dir))
        stack.enter_context(progress)
        watched = ChunkHistory(run_dir, step, evaluation.watched_text() if "chunks" in state else b"", writes=first)

        def evaluate(max_bytes: int) -> BitsPerByte | TargetScore | None:
            nonlocal best
            if watched.text and not hosts.gather(watched.has(step))[0]:
                watched.add(step, evaluation.boundaries(state["params"], watched.text))
            result = evaluation.bits_per_byte(state["params"], max_bytes)
            if result is None:
                return None
            log.write_once(
                {"step": step, "bytes": health.seen, "heldout_bpb": result.bpb, "heldout_bytes": result.bytes,
                 **result.more()}
            )  # fmt: skip
            progress.heldout(step, health.seen, result)
            if max_bytes == config.eval.max_bytes and result.bpb < (math.inf if best is None else best):
                best = result.bpb
                checkpoints.save_best(
                    step, state["params"], make_meta(config, step, bytes=health.seen, best_bpb=best, **belongs)
                )
            return result

        def save(wait: bool = False) -> None:
            meta = make_meta(config, step, bytes=health.seen, best_bpb=best, best_over=_best_over(config),
                             commit=commit, versions=versions(), **belongs)  # fmt: skip
            checkpoints.save(step, state, join_states(hosts.gather(batches.state())), meta, wait)

        state, capacity = resumed_capacity(config, state)
        first_step, last_save, saved_at, metrics, due = step, time.monotonic(), step, None, False
        while step < config.train.steps:
            profile(step, metrics)
            try:
                batch = next(batches)
            except DataError:  # a file that changed, a worker that died: keep what was learned
                if metrics is not None and not several:  # of several processes, the others know nothing of it
                    health.settle()
                    save(wait=True)
                raise
            late = 0 < config.checkpoint.every_seconds <= time.monotonic() - last_save
            if several:  # so that all stop and save after the same step
                copies = (len(mine), mesh.shape.get("sequence", 1), 1)
                batch["wishes"] = np.tile([stop.requested, late and first], copies)
            state, metrics = train_step(state, place_batch(batch, mesh, mine, config.data.batch_size), capacity)
            if mesh.devices.flat[0].platform == "cpu" and mesh.size > 1:
                # XLA's CPU collectives deadlock when several steps of many fake devices are in flight on few cores.
                jax.block_until_ready(metrics)
            step += 1
            health.after(step, metrics, batch)
            if capacity and time_to_choose(config.model, step):
                state, capacity = _choose_capacity(config, state, capacity, progress)
            last = step == config.train.steps
            stopping = stop.requested  # looked at once per step: a signal may come at any line
            if several:
                stopping, late = health.wishes
                late = late and health.looked_at > saved_at  # not one that the last save has fulfilled
            due = due or late or step % config.checkpoint.every == 0
            if step % config.train.log_every == 0 or stopping or last or due or step == first_step + 1:
                health.settle(last)
                if not health.in_row:
                    record = with_bits(_numbers(metrics))
                    record |= speed.measure(step, health.seen, forward_cost(config, record))
                    log.write({"step": step, "bytes": health.seen, "loss": record.pop("nll"), **record})
                    progress.update(step, health.seen, record)
            if config.eval.every and step % config.eval.every == 0 and not last:
                health.settle()
                with speed.paused():
                    evaluate(config.eval.max_bytes)
            if stopping or last or (due and not health.in_row):  # not in a streak of batches that are not finite
                with speed.paused():
                    save(wait=stopping)
                last_save, saved_at, due = time.monotonic(), step, False
            if stopping and not last:
                progress.note(f"stopped by {stop.name or 'another process'} at step {step}, saved; go on with:  "
                              f"bytelm train {run_dir}")  # fmt: skip
                raise Interrupted(str(run_dir))

        checkpoints.wait()
        if stop.requested and not several:
            raise Interrupted(str(run_dir))
        result = evaluate(config.eval.final_max_bytes)
        # Evaluations of different size do not compare: the best weights are chosen by those of eval.max_bytes.
        if config.eval.final_max_bytes != config.eval.max_bytes:
            evaluate(config.eval.max_bytes)
        checkpoints.wait()
        if first:
            plot_losses(log.path, run_dir / "loss.png")
            watched.write_report(run_dir / "report.html", f"{run_dir.name}: chunks over the run", run_dir / "loss.png")
        seconds = time.monotonic() - began
        progress.note(f"done: {step} steps, {amount(health.seen)} seen, {clock(seconds)}; run in {run_dir}")
    return Result(run_dir, step, result, best, seconds)


def forward_cost(config: Config, record: dict[str, float]) -> float:
    """Useful forward FLOPs a byte of a step, with the chunks that occurred in it."""
    if isinstance(config.model, T5Config):
        return t5_flops(
            config.model, config.data.seq_len, target_length(config.data), trained_kept(config.model, record)
        )
    if "bytes_per_token" in record:
        return forward_flops(config.model, config.data.seq_len, (record["bytes_per_token"],))
    names = (f"level{level}/bytes_per_chunk" for level in itertools.count())
    spans = [record[name] for name in itertools.takewhile(record.__contains__, names)]
    return forward_flops(config.model, config.data.seq_len, spans)


def _choose_capacity(config: Config, state: Any, now: Capacity, progress: Progress) -> tuple[Any, Capacity]:
    """Looks at what rows needed lately: the state with the capacity to go on with, and that capacity."""
    need = np.asarray(state["chunks"]["need"]).tolist()
    chosen = next_capacity(config.model, config.data.seq_len, now, need)
    if chosen == now:
        return state, now
    progress.note(f"slots per row: {' / '.join(map(str, now))} -> {' / '.join(map(str, chosen))} (compiling)")
    return with_capacity(state, chosen), chosen


def _write_config(config: Config, run_dir: Path) -> None:
    """The run's config, without what this start was told of its processes: the next one may have others."""
    general = dataclasses.replace(config, hosts=HostsConfig())
    (run_dir / "config.yaml.tmp").write_text(dumps(general), encoding="utf-8")
    (run_dir / "config.yaml.tmp").replace(run_dir / "config.yaml")


def _skipped(log: MetricsLog, progress: Progress, record: dict[str, Any]) -> None:
    log.write(record)
    progress.note(
        f"step {record['step']}: loss {record['loss']}, gradient norm {record['grad_norm']}: batch left out, weights "
        f"unchanged ({record['in_row']} in a row; its text is named in metrics.jsonl)"
    )


def _best_over(config: Config) -> list:
    """What the best held-out figure was measured on."""
    return [list(config.data.valid), config.data.valid_fraction, config.eval.max_bytes, config.eval.window]


def enable_compilation_cache(config: Config | None = None) -> None:
    """Keeps compiled programs on disk, so that a second start is quick (train.compilation_cache)."""
    folder = config.train.compilation_cache if config else ""
    if folder != "off" and not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", folder or str(cache_folder("") / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


@contextlib.contextmanager
def _own(run_dir: Path, first: bool = True) -> Iterator[None]:
    """Makes the run directory; the first process keeps other runs from training in it."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "a")  # noqa: SIM115 (closed below, after the run)
    except OSError as e:
        raise ConfigError(f"train.run_dir={run_dir}: cannot be written: {e}") from None
    with lock:
        try:
            if first:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"train.run_dir={run_dir}: another process is training there") from None
        yield


def _resume(config: Config, checkpoints: Checkpoints, abstract: Any, progress: Progress) -> tuple | None:
    """The newest readable checkpoint, if its config allows to go on from it."""
    for step in reversed(checkpoints.steps()):
        folder = checkpoints.folder / str(step)
        try:
            meta = read_meta(folder)
        except CheckpointError:  # restore() below says so and goes back
            continue
        if meta.get("format") != FORMAT:
            raise ConfigError(
                f"{folder}: saved by another version of bytelm ({meta.get('format')}, this one goes on from {FORMAT}); "
                "start a new run from its weights with --train.init-from"
            )
        changes = differences(stored_config(meta, str(folder)), config)
        blocking = blocking_changes(changes)
        break
    else:
        changes, blocking = [], []
    if blocking and not config.train.allow_config_change:
        raise ConfigError(
            f"train.run_dir={config.train.run_dir} holds a run with other settings (stored -> now):\n  "
            + "\n  ".join(blocking)
            + "\nSet them back, name another train.run_dir, or accept them with --train.allow-config-change"
        )
    for change in changes:
        progress.note(f"changed since the checkpoint: {change}")
    saved = checkpoints.restore(abstract)
    if saved:
        progress.note(f"resuming {config.train.run_dir} at step {int(saved[0]['step'])}")
    return saved


def _numbers(metrics: Any) -> dict[str, float]:
    """What is logged of a step's metrics; the rest was for Health."""
    logged = {k: v for k, v in metrics.items() if k not in ("wishes", "read", "skipped_in_row")}
    return {k: float(v) for k, v in jax.device_get(logged).items()}


@contextlib.contextmanager
def _profiler(config: Config, run_dir: Path) -> Iterator[Callable[[int, Any], None]]:
    """Yields a function to call before each step, which opens and closes the profiler window; so does the run's end."""
    first, end = config.train.profile_start, config.train.profile_start + config.train.profile_steps
    active = False

    def before(step: int, metrics: Any) -> None:
        nonlocal active
        if (first <= step < end) != active:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace() if active else jax.profiler.start_trace(str(run_dir / "profile"))
            active = not active

    try:
        yield before
    finally:
        if active:
            jax.profiler.stop_trace()


def describe(config: Config) -> str:
    """The whole config in a few lines, one section each."""
    sections = to_dict(config)
    return "\n".join(
        f"{name}: {yaml.safe_dump(fields, default_flow_style=True, sort_keys=False, width=10**6).strip()}"
        for name, fields in sections.items()
    )


def _print_start(config, progress, mesh, sources, heldout_text, parameters, step) -> None:
    progress.note(describe(config))
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    progress.note(
        f"{parameters:,} parameters · {mesh.size} {jax.devices()[0].device_kind} device(s) as {shape} · "
        f"training text: {' + '.join(s.describe() for s in sources)} · held out: {heldout_text.describe()} · "
        f"steps {step} to {config.train.steps}"
    )
