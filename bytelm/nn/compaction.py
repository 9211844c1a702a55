"""Moving the kept positions of each row into a fixed number of slots, and reading slots back, in static shapes.

Slot m of a row holds its m-th kept position; empty slots stand at the end. Kept positions beyond the last slot are
dropped by position, so that what a row keeps never depends on what comes later in it. Positions are scattered as
integers and vectors gathered once, which is faster than sorting, top-k or one-hot products on CPU and TPU. Slots are
counted over the whole row, also where a row is cut into pieces over devices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from bytelm.parallel import sequence


def slot_positions(keep: Bool[Array, "b t"], capacity: int) -> Int[Array, "b c"]:
    """Position of the kept element in each of `capacity` slots; t (past the row) in an empty slot."""
    t = keep.shape[1]
    slot = jnp.where(keep, jnp.cumsum(keep, axis=1) - 1, capacity)
    empty = jnp.full(capacity, t, jnp.int32)
    place = lambda row: empty.at[row].set(jnp.arange(t, dtype=jnp.int32), mode="drop")  # noqa: E731
    return jax.vmap(place)(slot)


def compact(x: Shaped[Array, "b t *d"], positions: Int[Array, "b c"]) -> Shaped[Array, "b c *d"]:
    """The elements of `x` at `slot_positions`, zero in empty slots.

    Where rows are cut into pieces, slots are as well: each piece of the row fills the slots that read from it."""
    if sequence.pieces() > 1:
        if positions.shape[1] % sequence.pieces():
            raise ValueError(
                f"{positions.shape[1]} slots cannot be cut into mesh.sequence={sequence.pieces()} equal pieces"
            )
        return sequence.over_pieces(_sent, x, positions)[0]
    return _taken(x, positions)


def _taken(x, positions):
    index = positions.reshape(*positions.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0)


def _sent(x, positions):
    """The slots of each piece go round all pieces, each of which lays in what it has: no piece ever holds all slots."""
    size = positions.shape[1] // jax.lax.axis_size(sequence.AXIS)
    start = sequence.number() * x.shape[1]

    def lay_in(slots, owner):
        theirs = jax.lax.dynamic_slice_in_dim(positions, owner * size, size, 1)
        here = (theirs >= start) & (theirs < start + x.shape[1])
        return slots + _taken(x, jnp.where(here, theirs - start, x.shape[1]))

    return sequence.gathered_round(lay_in, jnp.zeros((x.shape[0], size, *x.shape[2:]), x.dtype)), ()


def newest_slot(keep: Bool[Array, "b t"], capacity: int) -> Int[Array, "b t"]:
    """The slot of the last kept element at or before each position; the last slot where that one was dropped, and 0
    where nothing was kept yet."""
    return jnp.clip(jnp.cumsum(keep, axis=1) - 1, 0, capacity - 1)


def expand(z: Shaped[Array, "b c *d"], slots: Int[Array, "b t"]) -> Shaped[Array, "b t *d"]:
    """What stands in the given slots, at each position."""
    if sequence.pieces() > 1:
        return sequence.over_pieces(lambda split, _: (_read_from_all(*split), ()), (z, slots))[0]
    return _read(z, slots)


def _read_from_all(z, slots):
    """Reads from each piece's slots as they come round."""
    size = z.shape[1]

    def read(y, owner, theirs):
        index = slots - owner * size
        here = ((index >= 0) & (index < size)).reshape(*slots.shape, *(1,) * (z.ndim - 2))
        return jnp.where(here, _read(theirs, index), y)

    return sequence.shown_round(read, jnp.zeros((*slots.shape, *z.shape[2:]), z.dtype), z)


def _read(z, slots):
    index = slots.reshape(*slots.shape, *(1,) * (z.ndim - 2))
    return jnp.take_along_axis(z, index, axis=1, mode="clip")
