"""`bytelm plan --topology SLICE --sweep`: every mesh of a slice, ranked by formulas; nothing is compiled."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from bytelm.config import Config, ConfigError, T5Config
from bytelm.devices import CHIPS
from bytelm.models.build import structure
from bytelm.plan import Plan, engineering, make_plan
from bytelm.plan_pod import GIB, StepTimes, step_times
from bytelm.topology import Topology

# Share of a chip's memory that the formula may fill. Compiled for v5e:16x16 (TPU_SETUP.md), steps of H-Nets took 0.83
# to 1.09 of what it says, of a flat model 1.01, of encoder-decoders 1.20 to 1.47.
ROOM, ROOM_T5 = 0.8, 0.65
MOST_TENSOR = 16  # ways of a tensor axis: beyond, each part of a matmul is too thin for a chip


@dataclass(frozen=True)
class Ranked:
    """One mesh: its memory and times by formula."""

    plan: Plan
    times: StepTimes
    room: float  # bytes of a chip that the formula may fill

    @property
    def fits(self) -> bool:
        return self.plan.total_memory <= self.room

    @property
    def binds(self) -> str:
        return max(self.times.seconds, key=lambda name: self.times.seconds[name])


def sweep(
    config: Config, topology: Topology, bytes_per_chunk: tuple[float, ...] = ()
) -> tuple[list[Ranked], dict[str, str]]:
    """The meshes that this config can have on the topology, best first: those that fit before those that do not, by the
    mean of the shortest and the longest time of a step, then by memory; and why each other one cannot be.

    Raises ConfigError when there is none.
    """
    _, params = structure(config.model)
    share = ROOM_T5 if isinstance(config.model, T5Config) else ROOM
    room, chips = share * CHIPS[topology.generation.name].memory, topology.chips
    pieces = max(config.mesh.sequence, 1)  # stays as it is
    if chips % pieces:
        raise ConfigError(f"mesh.sequence={pieces} does not divide the {chips} chips of {topology.name}")
    each, found, refused = chips // pieces, [], {}
    for tensor in (n for n in range(1, min(each, MOST_TENSOR) + 1) if each % n == 0):
        for fsdp in (n for n in range(1, each // tensor + 1) if each // tensor % n == 0):
            sizes = {"data": each // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}
            name = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
            if sizes["data"] % topology.slices:
                refused[name] = f"each of {topology.slices} slices holds whole copies of the model"
                continue
            here = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, sequence=pieces, **sizes))
            try:
                plan = make_plan(here, chips, topology.generation.name, bytes_per_chunk, params)
            except ConfigError as e:
                refused[name] = str(e)
                continue
            found.append(Ranked(plan, step_times(here, plan, params, topology), room))
    if not found:
        raise ConfigError(
            f"--sweep: no mesh of {topology.name} works for this config; the last reason: {[*refused.values()][-1]}"
        )
    order = lambda one: (not one.fits, round(one.times.fast + one.times.slow, 6), one.plan.total_memory)  # noqa: E731
    return sorted(found, key=order), refused


def describe_sweep(topology: Topology, found: list[Ranked], refused: dict[str, str], most: int = 12) -> str:
    """The ranking as text for a terminal."""
    chip = CHIPS[topology.generation.name]
    slices = f"{topology.slices} slices of " if topology.slices > 1 else ""
    lines = [
        f"{slices}{topology.name} ({topology.cloud_name}): {topology.chips:,} chips of {chip.memory / GIB:.0f} GiB; "
        "by formulas, best first",
        "",
        f"{'data':>6}{'fsdp':>6}{'tensor':>8}{'GiB a chip':>12}{'s a step':>18}{'text/s':>20}   binds",
    ]
    for one in found[:most]:
        mesh, times, read = one.plan.mesh, one.times, one.plan.bytes_per_step
        lines.append(
            f"{mesh['data']:>6}{mesh['fsdp']:>6}{mesh['tensor']:>8}{one.plan.total_memory / GIB:>12.2f}"
            f"{f'{times.fast:.3f} to {times.slow:.3f}':>18}"
            f"{f'{engineering(read / times.slow)}B to {engineering(read / times.fast)}B':>20}   "
            + (one.binds if one.fits else "DOES NOT FIT")
        )
    if len(found) > most:
        lines.append(f"and {len(found) - most} more (--json has all)")
    if refused:
        name, why = next(iter(refused.items()))
        lines.append(f"{len(refused)} others cannot be; {name}: {why}")
    options = " ".join(f"--mesh.{axis} {size}" for axis, size in found[0].plan.mesh.items())
    if found[0].fits:
        lines += ["", f"compile the first: --topology {topology.name} {options}"]
    else:
        short, share = (found[0].plan.total_memory - found[0].room) / GIB, found[0].room / chip.memory
        lines += [
            "",
            f"none fits ({share:.0%} of a chip's memory by formula): the best is short of {short:.1f} GiB.",
            f"--train.grad-accum takes fewer rows at a time; more advice: --topology {topology.name} {options}",
        ]
    return "\n".join(lines)


def sweep_to_json(found: list[Ranked], refused: dict[str, str]) -> str:
    """The ranking as JSON."""
    ranked: list[dict[str, Any]] = [
        {"mesh": one.plan.mesh, "fits": one.fits, "memory": one.plan.total_memory, "binds": one.binds}
        | dataclasses.asdict(one.times)
        for one in found
    ]
    return json.dumps({"meshes": ranked, "refused": refused})
