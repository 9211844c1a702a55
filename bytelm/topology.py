"""TPU slices: their names in Google Cloud and in libtpu, and which of them exist.

Facts from Google Cloud's documentation of TPU v4, v5e, v5p and v6e ("TPU configurations"): v4 and v5p slices are
three-dimensional and named by TensorCores, two to a chip (v5p-128 has 64 chips); v5e (v5litepod-N) and v6e slices are
two-dimensional and named by chips, 256 at most. A host has four chips; one of v5e and v6e eight in slices of up to
eight chips, and four beyond.
"""

import itertools
import math
import re
from dataclasses import dataclass

from bytelm.config import ConfigError


@dataclass(frozen=True)
class Generation:
    """What slices a generation of TPU comes in."""

    name: str  # as libtpu and devices.CHIPS call it
    cloud: str  # what stands in front of the number in a slice's cloud name
    dimensions: int
    cores_per_chip: int  # that the cloud name counts; 1 where it counts chips
    small: tuple[tuple[int, ...], ...]  # slices with a side that is no multiple of four (3-D), or all of them (2-D)
    largest: tuple[int, ...]  # longest sides of a 3-D slice, all multiples of four
    host_network: float  # bytes/s of a host's network, which carries what passes between slices


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
GENERATIONS = {
    g.name: g
    for g in (
        Generation("v4", "v4-", 3, 2, _SMALL, (12, 16, 16), 12.5e9),
        Generation("v5p", "v5p-", 3, 2, _SMALL, (16, 16, 24), 25e9),
        Generation("v5e", "v5litepod-", 2, 1, _FLAT, (), 12.5e9),
        Generation("v6e", "v6e-", 2, 1, _FLAT, (), 25e9),
    )
}


@dataclass(frozen=True)
class Topology:
    """Some equal slices of one generation."""

    generation: Generation
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips_per_slice(self) -> int:
        return math.prod(self.shape)

    @property
    def chips(self) -> int:
        return self.slices * self.chips_per_slice

    @property
    def hosts(self) -> int:
        """Each with four chips; small 2-D slices have one host."""
        per_host = 8 if self.generation.dimensions == 2 and self.chips_per_slice <= 8 else 4
        return self.slices * max(self.chips_per_slice // per_host, 1)

    @property
    def name(self) -> str:
        """As libtpu has it, of one slice: v5p:4x4x4."""
        return f"{self.generation.name}:{'x'.join(map(str, self.shape))}"

    @property
    def cloud_name(self) -> str:
        """As Google Cloud has it, of one slice: v5p-128."""
        return _cloud_name(self.generation, self.chips_per_slice)


def _cloud_name(generation: Generation, chips: int) -> str:
    return f"{generation.cloud}{chips * generation.cores_per_chip}"


def shapes(generation: Generation) -> list[tuple[int, ...]]:
    """Every slice that exists, sides rising, smallest first."""
    sides = [range(4, side + 1, 4) for side in generation.largest]
    large = {tuple(sorted(shape)) for shape in itertools.product(*sides)} if sides else set()
    return sorted({*generation.small, *large}, key=lambda shape: (math.prod(shape), max(shape), shape))


def parse_topology(text: str, slices: int = 1) -> Topology:
    """A slice by its shape (v5p:4x4x4) or cloud name (v5p-128, v5litepod-16, v6e-256).

    Raises ConfigError for one that does not exist, naming the nearest that do.
    """
    if slices < 1:
        raise ConfigError(f"--num-slices {slices}: must be at least 1")
    match = re.fullmatch(r"(v\d+[a-z]*):(\d+(?:x\d+)*)", text)
    if match and match[1] in GENERATIONS:
        generation, shape = GENERATIONS[match[1]], tuple(map(int, match[2].split("x")))
        there = shapes(generation)
        found = [s for s in there if sorted(s) == sorted(shape)]
        if not found or len(shape) != generation.dimensions:
            raise ConfigError(f"--topology {text}: no such slice; {_nearest(generation, math.prod(shape))}")
        return Topology(generation, found[0], slices)
    for generation in GENERATIONS.values():
        for prefix in {generation.cloud, f"{generation.name}-"}:
            if text.startswith(prefix) and text[len(prefix) :].isdecimal():
                return _of_cloud_name(generation, text, int(text[len(prefix) :]), slices)
    raise ConfigError(
        f"--topology {text!r}: give a shape such as v5p:4x4x4, or a cloud name such as v5p-128, v5litepod-16 or "
        f"v6e-256; generations: {', '.join(GENERATIONS)}"
    )


def _of_cloud_name(generation: Generation, text: str, number: int, slices: int) -> Topology:
    chips, rest = divmod(number, generation.cores_per_chip)
    found = [s for s in shapes(generation) if math.prod(s) == chips and not rest]
    if not found:
        raise ConfigError(
            f"--topology {text}: no such slice; {_nearest(generation, number / generation.cores_per_chip)}"
        )
    return Topology(generation, found[0], slices)  # the most cubic of that size


def _nearest(generation: Generation, chips: float) -> str:
    there = shapes(generation)
    below = [s for s in there if math.prod(s) <= chips]
    above = [s for s in there if math.prod(s) >= chips]
    near = [s for s in (*below[-1:], *above[:1])]
    said = [Topology(generation, s) for s in dict.fromkeys(near)]
    return "the nearest real: " + ", ".join(f"{t.name} ({t.cloud_name}, {t.chips} chips)" for t in said)
