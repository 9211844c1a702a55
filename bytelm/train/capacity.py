"""How many chunk slots a training step reserves at each level of a model with units, chosen from what was measured.

At the start an H-Net makes a boundary at 30 to 50 % of all bytes, trained at about one in N; slots for every byte would
forfeit the saving. So training starts with `capacity.start` and looks every `capacity.every` steps at the slots that
the 99th-percentile row needed lately, times a margin. Slots come in a few fixed sizes: each is compiled once.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from bytelm.config import CapacityConfig, ModelConfig, UnitConfig

SHARES = tuple(0.6 * 0.75**k for k in range(14))  # of the row; and 1
FORGET = 0.03  # how fast a past maximum of the need is forgotten, per step

Capacity = tuple[int, ...]


def sizes(row: int, config: CapacityConfig) -> tuple[int, ...]:
    """The numbers of slots that a level may have on rows of `row` bytes, falling."""
    up = lambda share: min(-(-int(share * row) // config.multiple) * config.multiple, row)  # noqa: E731
    return tuple(sorted({row, *(up(share) for share in (*SHARES, *config.start))}, reverse=True))


def first_capacity(model: ModelConfig, row: int) -> Capacity:
    """Slots of each level before anything is measured; () for a model without levels."""
    out: list[int] = []
    for level in range(_levels(model)):
        assert isinstance(model, UnitConfig)
        start = model.capacity.start
        share = start[min(level, len(start) - 1)]
        above = out[-1] if out else row
        out.append(min(_fitting(sizes(row, model.capacity), share * above), above))
    return tuple(out)


def possible_capacity(model: ModelConfig, row: int, saved: Capacity) -> Capacity:
    """The slots of a saved state if the config could have chosen them, else those to start with."""
    assert isinstance(model, UnitConfig)
    first, choices = first_capacity(model, row), sizes(row, model.capacity)
    chosen = len(saved) == len(first) and all(slots in choices for slots in saved)
    return saved if chosen and (model.capacity.every or saved == first) else first


def time_to_choose(model: ModelConfig, step: int) -> bool:
    """Whether the slots are chosen anew after `step` steps."""
    return isinstance(model, UnitConfig) and model.capacity.every > 0 and step % model.capacity.every == 0


def next_capacity(model: ModelConfig, row: int, now: Capacity, need: Sequence[float]) -> Capacity:
    """Slots of each level given those of now and the slots that rows needed lately.

    More as soon as the need is above what there is; fewer once the need, with the margin, fits a smaller size.
    """
    assert isinstance(model, UnitConfig)
    choices, out = sizes(row, model.capacity), []
    for level, (slots, needed) in enumerate(zip(now, need)):
        wanted = _fitting(choices, needed * model.capacity.margin)
        chosen = wanted if needed > slots or wanted < slots else slots
        out.append(min(chosen, out[-1] if level else row))
    return tuple(out)


def track_need(before: Float[Array, " l"], now: Float[Array, " l"]) -> Float[Array, " l"]:
    """The need lately: a maximum over steps that slowly forgets."""
    return jnp.maximum(now, before + FORGET * (now - before))


def _fitting(choices: Sequence[int], wanted: float) -> int:
    """The smallest of the falling `choices` that is at least `wanted`; the largest where none is."""
    return min((c for c in choices if c >= wanted), default=choices[0])


def _levels(model: ModelConfig) -> int:
    return model.levels if isinstance(model, UnitConfig) else 0
