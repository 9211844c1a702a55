"""How many slots a training step reserves at each level of a model with units, or for the bytes that an encoder keeps,
chosen from what was measured.

At the start an H-Net makes a boundary at 30 to 50 % of all bytes, trained at about one in N; slots for every byte would
forfeit the saving. So training starts with `capacity.start` and looks every `capacity.every` steps at the slots that
the 99th-percentile row needed lately, times a margin. Slots come in a few fixed sizes: each is compiled once. A delete
gate starts open and closes slowly, so that its sizes lie closer.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bytelm.config import CapacityConfig, Config, ModelConfig, T5Config, UnitConfig
from bytelm.parallel import hosts

SHARES = tuple(0.6 * 0.75**k for k in range(14))  # of the row; and 1
KEPT_SHARES = tuple(0.85**k for k in range(20))  # of what a delete gate keeps
FORGET = 0.03  # how fast a past maximum of the need is forgotten, per step

Capacity = tuple[int, ...]


def rule_of(model: ModelConfig) -> tuple[CapacityConfig, tuple[float, ...]] | None:
    """How a model's slots are chosen, and the shares of a row to choose from; None where all rows have the same."""
    if isinstance(model, UnitConfig):
        return model.capacity, SHARES
    if isinstance(model, T5Config) and model.deletion.gated and model.deletion.train == "compact":
        d = model.deletion
        if d.capacity_every:
            start = (d.capacity or 1.0,)
            return CapacityConfig(start=start, margin=1.1, every=d.capacity_every, multiple=8), KEPT_SHARES
    return None


def sizes(row: int, config: CapacityConfig, shares: Sequence[float] = SHARES) -> tuple[int, ...]:
    """The numbers of slots that a level may have on rows of `row` bytes, falling."""
    up = lambda share: min(-(-max(int(share * row), 1) // config.multiple) * config.multiple, row)  # noqa: E731
    return tuple(sorted({row, *(up(share) for share in (*shares, *config.start))}, reverse=True))


def first_capacity(model: ModelConfig, row: int) -> Capacity:
    """Slots of each level before anything is measured; () for a model without slots to choose."""
    if rule_of(model) is None:
        return ()
    config, shares = _rule(model)
    out: list[int] = []
    for level in range(model.levels if isinstance(model, UnitConfig) else 1):
        share = config.start[min(level, len(config.start) - 1)]
        above = out[-1] if out else row
        out.append(min(_fitting(sizes(row, config, shares), share * above), above))
    return tuple(out)


def possible_capacity(model: ModelConfig, row: int, saved: Capacity) -> Capacity:
    """The slots of a saved state if the config could have chosen them, else those to start with."""
    config, shares = _rule(model)
    first, choices = first_capacity(model, row), sizes(row, config, shares)
    chosen = len(saved) == len(first) and all(slots in choices for slots in saved)
    return saved if chosen and (config.every or saved == first) else first


def time_to_choose(model: ModelConfig, step: int) -> bool:
    """Whether the slots are chosen anew after `step` steps."""
    rule = rule_of(model)
    return rule is not None and rule[0].every > 0 and step % rule[0].every == 0


def next_capacity(model: ModelConfig, row: int, now: Capacity, need: Sequence[float]) -> Capacity:
    """Slots of each level given those of now and the slots that rows needed lately.

    More as soon as the need is above what there is; fewer once the need, with the margin, fits a smaller size. As many
    where no row has needed any yet (all batches were skipped).
    """
    config, shares = _rule(model)
    choices, out = sizes(row, config, shares), []
    for level, (slots, needed) in enumerate(zip(now, need)):
        wanted = _fitting(choices, needed * config.margin)
        chosen = wanted if needed > slots or (needed > 0 and wanted < slots) else slots
        out.append(min(chosen, out[-1] if level else row))
    return tuple(out)


def resumed_capacity(config: Config, state: Any) -> tuple[Any, Capacity]:
    """The slots of each level to go on with, and a state that says so, or has no record of slots where none are chosen
    (settings that a run may change decide that). Slots that the config of now would not choose give way to those it
    starts with."""
    first = first_capacity(config.model, config.data.seq_len)
    if not first:
        return {name: part for name, part in state.items() if name != "chunks"}, ()
    if "chunks" not in state:
        need = hosts.place(np.zeros(len(first), np.float32), state["step"].sharding)
        return with_capacity({**state, "chunks": {"need": need}}, first), first
    saved = tuple(int(slots) for slots in np.asarray(state["chunks"]["capacity"]))
    capacity = possible_capacity(config.model, config.data.seq_len, saved)
    return (state if capacity == saved else with_capacity(state, capacity)), capacity


def with_capacity(state: Any, capacity: Capacity) -> Any:
    """A train state that records these slots."""
    placed = hosts.place(np.array(capacity, np.int32), state["chunks"]["need"].sharding)
    return {**state, "chunks": {**state["chunks"], "capacity": placed}}


def track_need(before: Float[Array, " l"], now: Float[Array, " l"]) -> Float[Array, " l"]:
    """The need lately: a maximum over steps that slowly forgets."""
    return jnp.maximum(now, before + FORGET * (now - before))


def _rule(model: ModelConfig) -> tuple[CapacityConfig, tuple[float, ...]]:
    rule = rule_of(model)
    assert rule is not None, "a model without slots to choose"
    return rule


def _fitting(choices: Sequence[int], wanted: float) -> int:
    """The smallest of the falling `choices` that is at least `wanted`; the largest where none is."""
    return min((c for c in choices if c >= wanted), default=choices[0])
