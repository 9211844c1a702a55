"""Rows cut into pieces over the mesh axis `sequence`, where one device cannot hold one: what crosses between pieces.

Most of a network works on each position by itself and needs nothing but the hint of `shard`. Recurrences, attention and
the exchange of chunks do: they run as one program per piece (`over_pieces`), which sees its own part of each row and
asks for the rest by the functions here. A function that has both forms looks at `pieces`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from bytelm.parallel.mesh import unroll

AXIS = "sequence"


def pieces() -> int:
    """How many pieces rows are cut into here; 1 without a mesh, and inside `over_pieces`."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or AXIS in mesh.manual_axes else mesh.shape.get(AXIS, 1)


def over_pieces(f: Callable[[Any, Any], tuple[Any, Any]], split: Any, whole: Any = ()) -> tuple[Any, Any]:
    """f(split, whole) as one program per piece: arrays of `split` [b, t, ...] come cut along t, those of `whole` whole,
    and so do the two things that f gives: the second must be the same in every piece.

    Raises ValueError where a length does not divide into the pieces.
    """
    count = pieces()
    for x in jax.tree.leaves(split):
        if x.shape[1] % count:
            raise ValueError(f"rows of {x.shape[1]} positions cannot be cut into mesh.sequence={count} equal pieces")
    specs = (P(None, AXIS), P())
    return jax.shard_map(f, in_specs=specs, out_specs=specs, axis_names={AXIS}, check_vma=False)(split, whole)


def number() -> Array:
    """Which piece this is."""
    return jax.lax.axis_index(AXIS)


def from_before(x: Array, first: Any) -> Array:
    """`x` of the piece before; in the first one, `first`."""
    moved = jax.lax.ppermute(x, AXIS, [(i, i + 1) for i in range(jax.lax.axis_size(AXIS) - 1)])
    return jnp.where(number() == 0, jnp.asarray(first, x.dtype), moved)


def onward(x: Any) -> Any:
    """What the piece before has; the first has the last one's."""
    count = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(x, AXIS, [(i, (i + 1) % count) for i in range(count)])


def owner_after(moves: Array) -> Array:
    """Whose it was, what this piece holds after so many moves `onward`."""
    return (number() - moves) % jax.lax.axis_size(AXIS)


def shown_round(read: Callable[[Any, Array, Any], Any], so_far: Any, shown: Any) -> Any:
    """read(so_far, owner, arrays) of what every piece shows, one after another, from its own backwards."""

    def turn(now, moves):
        so_far, held = now
        return (read(so_far, owner_after(moves), held), onward(held)), None

    return jax.lax.scan(turn, (so_far, shown), jnp.arange(jax.lax.axis_size(AXIS)), unroll=unroll())[0][0]


def gathered_round(add: Callable[[Array, Array], Array], empty: Array) -> Array:
    """Every piece's own array, `empty` at first, after all pieces have put in what they have: add(array, owner)."""

    def turn(held, moves):
        return add(onward(held), owner_after(moves + 1)), None

    return jax.lax.scan(turn, empty, jnp.arange(jax.lax.axis_size(AXIS)), unroll=unroll())[0]


def carried_in(added: Array, kept: Array) -> tuple[Array, Array]:
    """The state of a linear recurrence in front of this piece, and behind the last one: over a piece the state becomes
    kept state + added; in front of the first it is 0."""
    every = jax.lax.all_gather((added, kept), AXIS)
    end, before = jax.lax.scan(lambda s, now: (now[1] * s + now[0], s), jnp.zeros_like(added), every)
    return before[number()], end
