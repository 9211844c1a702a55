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


def of_all(x: Array) -> Array:
    """`x` [b, s, ...] of all pieces, side by side: [b, pieces * s, ...]."""
    return jax.lax.all_gather(x, AXIS, axis=1, tiled=True)


def shared_out(x: Array) -> Array:
    """The sum over pieces of `x` [b, t, ...], of which each keeps its own part of t."""
    return jax.lax.psum_scatter(x, AXIS, scatter_dimension=1, tiled=True)


def carried_in(added: Array, kept: Array) -> tuple[Array, Array]:
    """The state of a linear recurrence in front of this piece, and behind the last one: over a piece the state becomes
    kept state + added; in front of the first it is 0."""
    every = jax.lax.all_gather((added, kept), AXIS)
    end, before = jax.lax.scan(lambda s, now: (now[1] * s + now[0], s), jnp.zeros_like(added), every)
    return before[number()], end
