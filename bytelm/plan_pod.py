"""`bytelm plan --topology`: what a config costs on TPU slices, from a compilation of its train step and formulas."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bytelm.communication import PURPOSES, bytes_per_step
from bytelm.config import Config, remat_field
from bytelm.devices import CHIPS, Chip
from bytelm.models.build import structure
from bytelm.models.flops import TRAIN_FACTOR
from bytelm.plan import Plan, engineering, make_plan, model_flops
from bytelm.plan_compile import compile_for
from bytelm.topology import Topology
from bytelm.train.capacity import next_capacity

GIB = 2.0**30
# Shares of a chip's nominal matmul rate that matmuls of a training step reach: below, many small ones and nothing
# overlapped; above, large ones and all communication behind them.
SLOW, FAST = 0.4, 0.75
TO_TRY = 3
SPREAD = 1.25  # slots that the 99th-percentile row needs, over the mean row's


@dataclass(frozen=True)
class PodPlan:
    """The figures of `bytelm plan --topology`; times are seconds of one optimizer step."""

    topology: Topology
    plan: Plan  # parameters and FLOPs
    slots_later: tuple[int, ...]  # chunk slots per row once an H-Net's boundaries are as rare as planned; for the times
    executed_later: float  # training FLOPs a byte with them
    compiled: dict[str, Any]  # see plan_compile.compile_for
    memory: dict[str, float]  # bytes on one chip by use; empty when it does not fit
    chip: Chip
    communication: dict[str, float]  # bytes through one chip in a step, by purpose
    seconds: dict[str, float]  # compute, memory, interconnect, between slices: each alone, at full nominal rate
    utilization: tuple[float, float]  # of the nominal rate, by useful FLOPs: from nothing overlapped to all
    bytes_per_second: tuple[float, float]  # of text
    chip_hours: tuple[float, float]  # of the whole run, from all overlapped to nothing
    checkpoint_bytes: int  # weights and both moments in float32
    advice: tuple[str, ...] = ()  # when it does not fit

    @property
    def fits(self) -> bool:
        return "out_of_memory" not in self.compiled

    @property
    def binds(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])


@dataclass(frozen=True)
class StepTimes:
    """What a step takes by formulas, of which nothing is compiled."""

    slots: tuple[int, ...]  # chunk slots per row once an H-Net's boundaries are as rare as planned
    executed: float  # training FLOPs a byte with them
    communication: dict[str, float]  # bytes through one chip, by purpose
    seconds: dict[str, float]  # compute, memory, interconnect, between slices: each alone, at full nominal rate
    slow: float  # seconds with matmuls at SLOW of nominal, nothing overlapped
    fast: float  # at FAST, all overlapped


def step_times(config: Config, plan: Plan, params: Any, topology: Topology) -> StepTimes:
    """The times of a step on a topology, whose mesh is the plan's; `params`: the model's shapes."""
    chip, row = CHIPS[topology.generation.name], config.data.seq_len
    need = [SPREAD * row / n for n in plan.bytes_per_chunk]
    slots = next_capacity(config.model, row, plan.slots, need) if plan.slots else ()
    executed = TRAIN_FACTOR * model_flops(config, [row / n for n in slots])
    communication = bytes_per_step(config, params, plan.mesh, slots, topology.slices)
    seconds = _seconds(config, plan, executed, communication, topology, chip)
    compute = seconds["compute"]
    slow = compute / SLOW + sum(seconds.values()) - compute
    fast = max(compute / FAST, *(value for name, value in seconds.items() if name != "compute"))
    return StepTimes(slots, executed, communication, seconds, slow, fast)


def make_pod_plan(config: Config, topology: Topology, cache: Path, bytes_per_chunk: tuple[float, ...] = ()) -> PodPlan:
    """Compiles the train step for the topology and counts the rest. Raises ConfigError; does not allocate."""
    _, params = structure(config.model)
    plan = make_plan(config, topology.chips, topology.generation.name, bytes_per_chunk, params)
    compiled = compile_for(config, topology, cache)
    chip = CHIPS[topology.generation.name]
    memory = {} if "out_of_memory" in compiled else _memory(plan, compiled, chip)
    times = step_times(config, plan, params, topology)
    step_bytes, slow, fast = plan.bytes_per_step, times.slow, times.fast
    ideal = plan.train_flops_per_byte * step_bytes / (topology.chips * chip.flops)
    hours = [config.train.steps * each * topology.chips / 3600 for each in (fast, slow)]
    made = PodPlan(
        topology, plan, times.slots, times.executed, compiled, memory, chip, times.communication, times.seconds,
        (ideal / slow, ideal / fast), (step_bytes / slow, step_bytes / fast), (hours[0], hours[1]),
        12 * plan.total_parameters,
    )  # fmt: skip
    if made.fits:
        return made
    return dataclasses.replace(made, advice=tuple(_advice(config, made, cache)))


def _memory(plan: Plan, compiled: dict[str, Any], chip: Chip) -> dict[str, float]:
    """Bytes on one chip. The compiler knows arguments and temporaries; gradients among these are counted by size."""
    known = plan.memory["weights"] + plan.memory["optimizer"]
    gradients = min(plan.memory["gradients"], compiled["temporaries"])
    used = {
        "parameters": plan.memory["weights"],
        "optimizer": plan.memory["optimizer"],
        "batch, padding of layouts": max(compiled["arguments"] - known, 0.0),
        "gradients": gradients,
        "activations and temporaries": compiled["temporaries"] - gradients,
        "outputs not in place of arguments": float(compiled["outputs"] - compiled["aliased"]),
        "program": float(compiled["code"]),
    }
    return used | {"headroom": chip.memory - sum(used.values())}


def _seconds(
    config: Config, plan: Plan, executed: float, communication: dict[str, float], topology: Topology, chip: Chip
) -> dict[str, float]:
    """Seconds of a step that each resource takes alone, at its nominal rate."""
    within = sum(size for purpose, size in communication.items() if purpose != "between slices")
    # Weights, moments and gradients are read and written once; what is kept is written forward and read backward.
    moved = 2 * (plan.memory["weights"] + plan.memory["optimizer"] + plan.memory["gradients"])
    moved += 2 * plan.memory["activations (estimate)"] * config.train.grad_accum
    out = {
        "compute": executed * plan.bytes_per_step / (topology.chips * chip.flops),
        "memory": moved / chip.bandwidth,
        "interconnect": within / chip.link,
    }
    if topology.slices > 1:
        per_host = topology.chips / topology.hosts
        out["between slices"] = communication["between slices"] * per_host / topology.generation.host_network
    return out


def _advice(config: Config, made: PodPlan, cache: Path) -> list[str]:
    """Three things to try, and the largest batch that fits, confirmed by a compilation."""
    accum, mesh = config.train.grad_accum, made.plan.mesh
    remat_name, remat = remat_field(config.model)
    rows = config.data.batch_size // (mesh["data"] * mesh["fsdp"] * accum)
    out = []
    if rows > 1:
        out.append(f"--train.grad-accum {2 * accum}: {rows} rows at a time on a chip become {rows // 2}")
    if remat != "full":
        out.append(f"--{remat_name} full (now {remat}): recompute more")
    if config.model.dtype == "float32":
        out.append("--model.dtype bfloat16: half the bytes of what is kept")
    if mesh["data"] > made.topology.slices:
        out.append(
            f"--mesh.fsdp {mesh['fsdp'] * mesh['data'] // made.topology.slices}: weights and optimizer in more pieces"
        )
    out.append(f"--data.seq-len {config.data.seq_len // 2}: shorter rows")
    out.append(
        "a larger slice" if made.topology.generation.dimensions == 3 else "more slices, or chips with more memory"
    )
    return [*out[:TO_TRY], _largest_batch(config, made, cache)]


def _largest_batch(config: Config, made: PodPlan, cache: Path) -> str:
    """The rows that fit, by bisection with compilations; the first guess is by proportion."""
    needs, has = (made.compiled["out_of_memory"][key] for key in ("needs", "has"))
    ways = made.plan.mesh["data"] * made.plan.mesh["fsdp"] * config.train.grad_accum
    fixed = sum(made.plan.memory[use] for use in ("weights", "optimizer", "gradients")) / GIB
    fitting, failing = 0, config.data.batch_size // ways  # rows on a chip at a time
    guess = math.floor(failing * max(has - fixed, 0.0) / max(needs - fixed, 1e-9))
    while failing - fitting > max(1, failing // 16):
        rows = min(max(guess, fitting + 1), failing - 1)
        data = dataclasses.replace(config.data, batch_size=rows * ways, shards=0, workers=0)
        compiled = compile_for(dataclasses.replace(config, data=data), made.topology, cache)
        fitting, failing = (fitting, rows) if "out_of_memory" in compiled else (rows, failing)
        guess = (fitting + failing) // 2
    if not fitting:
        return f"no batch fits: one row on a chip ({ways} rows in all) is too much"
    return f"--data.batch-size {fitting * ways}: fits, {failing * ways} does not (compiled)"


def describe_pod_plan(config: Config, made: PodPlan) -> str:
    """The plan as text for a terminal."""
    t, plan = made.topology, made.plan
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    slices = f"{t.slices} slices of " if t.slices > 1 else ""
    lines = [
        f"{slices}{t.name} ({t.cloud_name}): {t.chips:,} chips, {t.hosts:,} hosts, mesh {mesh}",
        f"{plan.total_parameters:,} parameters; a step reads {plan.bytes_per_step:,} bytes",
        "",
    ]
    if not made.fits:
        memory = made.compiled["out_of_memory"]
        lines += [f"DOES NOT FIT: needs {memory['needs']:.1f}, has {memory['has']:.2f} GiB on a chip. Try:"]
        return "\n".join([*lines, *(f"  - {advice}" for advice in made.advice)])
    lines += [f"memory on one of {made.chip.name}'s {made.chip.memory / GIB:.0f} GiB, as compiled:"]
    lines += [f"  {use:<36}{size / GIB:>9.3f} GiB" for use, size in made.memory.items()]
    useful, executed = plan.train_flops_per_byte, made.executed_later
    lines += [
        "",
        f"useful FLOPs      {engineering(useful)} per byte, {engineering(useful * plan.bytes_per_step)} per step",
        f"executed FLOPs    {engineering(executed)} per byte, {engineering(executed * plan.bytes_per_step)} per step",
    ]
    if plan.slots:
        each = " and ".join(f"{n:.3g}" for n in plan.bytes_per_chunk)
        start, later = (" and ".join(map(str, slots)) for slots in (plan.slots, made.slots_later))
        lines += [
            f"  useful at {each} bytes per chunk; executed with {later} slots a row, once trained so far;",
            f"  {engineering(plan.executed_flops_per_byte)} per byte with {start}, as training starts and as compiled",
        ]
    lines += ["", "bytes through one chip in a step, from the sharding table:"]
    lines += [
        f"  {purpose:<18}{engineering(size) + 'B':>10}   {PURPOSES[purpose]}"
        for purpose, size in made.communication.items()
    ]
    kinds = ", ".join(
        f"{e['count']} {kind} ({engineering(e['bytes'])}B)" for kind, e in made.compiled["collectives"].items()
    )
    lines += [f"  in the compiled text, each loop once: {kinds or 'none'}"]
    if kernels := made.compiled.get("kernels"):
        lines += [f"  and {kernels} Pallas kernels (attention)"]
    lines += ["", "seconds of a step at nominal rates, each alone:"]
    for name, value in made.seconds.items():
        lines.append(f"  {name:<18}{value:>10.4f}" + ("   binds" if name == made.binds else ""))
    (low, high), (slow, fast), (least, most) = made.utilization, made.bytes_per_second, made.chip_hours
    total = config.train.steps * plan.bytes_per_step
    lines += [
        "",
        f"utilisation       {100 * low:.0f} to {100 * high:.0f} % of nominal, by useful FLOPs",
        f"  low: matmuls at {100 * SLOW:.0f} % of nominal, nothing overlaps; high: at {100 * FAST:.0f} %, all overlaps",
        f"text              {engineering(slow)}B/s to {engineering(fast)}B/s; {engineering(slow / t.hosts)}B/s to "
        f"{engineering(fast / t.hosts)}B/s for the loader of each host",
        f"the run           {config.train.steps:,} steps, {engineering(total)}B",
        f"                  {least:,.0f} to {most:,.0f} chip-hours",
        f"checkpoint        {made.checkpoint_bytes / 1e9:,.2f} GB",
        "",
        "compiled in {:.0f} s with {}".format(
            made.compiled["seconds"], ", ".join(f"{k} {v}" for k, v in made.compiled["versions"].items())
        ),
    ]
    return "\n".join(lines)


def pod_to_json(made: PodPlan) -> dict[str, Any]:
    """The plan as plain data."""
    out = dataclasses.asdict(made)
    out["topology"] = {
        "name": made.topology.name, "cloud_name": made.topology.cloud_name, "slices": made.topology.slices,
        "chips": made.topology.chips, "hosts": made.topology.hosts,
    }  # fmt: skip
    return out | {"fits": made.fits, "binds": made.binds}
