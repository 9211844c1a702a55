"""Boundaries that a rule tells instead of a router: to know what of an H-Net is its chunker, what its architecture.

`spacelike` is SpaceByte's rule, `words` and `space_words` are HAT's and white space (a boundary where it is known that
a word began: at the end of its first character), `fixed` is every N-th byte, `random` one of N by a hash of place and
bytes.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from bytelm.models.chunking import segment_starts
from bytelm.models.spacebyte import spacelike
from bytelm.models.units import make_units
from bytelm.models.word_steps import WordState, new_words, read_byte, word_marks, words_behind

MAX_WORD = 100  # bytes
_RULES = {"words": "unicode", "space_words": "space"}


@jax.tree_util.register_dataclass
@dataclass
class ToldState:
    """Where each row stands: its last byte (-1: none), how many it has read, and its words."""

    before: Int[Array, "*b"]
    place: Int[Array, "*b"]
    words: WordState


def _by_place(kind: str, n: float, byte, before, place) -> Bool[Array, "*b"]:
    """Boundaries of the rules that look at a byte, the one before and the place in the document."""
    if kind == "spacelike":
        return spacelike(byte) & ~((before >= 0) & spacelike(before))
    if kind == "fixed":
        return place % round(n) == 0
    parts = ((place, 2654435761), (byte, 40503), (before, 69069))
    x = sum(value.astype(jnp.uint32) * jnp.uint32(factor) for value, factor in parts)
    x = (x ^ (x >> 15)) * jnp.uint32(2246822519)
    return (x ^ (x >> 13)) < jnp.uint32(2**32 / n)


def told_boundaries(
    kind: str, n: float, inputs: Int[Array, "b t"], segments: Int[Array, "b t"] | None
) -> Bool[Array, "b t"]:
    """Boundaries of rows; every document begins with one. `n`: bytes per chunk of `fixed` and `random`."""
    starts = segment_starts(segments, *inputs.shape)
    if kind in _RULES:
        return starts | (word_marks(inputs, starts, _RULES[kind], MAX_WORD)[1] > 0)
    before = jnp.pad(inputs[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    before = jnp.where(starts, -1, before)
    place = make_units(jnp.zeros(inputs.shape, bool), segments, 1).place
    return starts | _by_place(kind, n, inputs, before, place)


def told_behind(kind: str, inputs: Int[Array, "b t"], lengths: Int[Array, " b"]) -> ToldState:
    """The state behind right-padded rows."""
    last = jnp.take_along_axis(inputs, (lengths - 1)[:, None], axis=1)[:, 0]
    words = words_behind(inputs, lengths, _RULES[kind], MAX_WORD) if kind in _RULES else new_words(len(inputs))
    return ToldState(last, lengths, words)


def told_extend(
    kind: str, n: float, state: ToldState, bytes_: Int[Array, "b q"]
) -> tuple[ToldState, Bool[Array, "b q"]]:
    """The states behind each of several more bytes per row, [b, q], and whether a boundary is at them."""
    every = jnp.ones(len(bytes_), bool)

    def one(state, byte):
        state, boundary = told_step(kind, n, state, byte, every)
        return state, (state, boundary)

    _, found = jax.lax.scan(one, state, bytes_.T)
    return jax.tree.map(lambda x: x.T, found)


def no_bytes(b: int) -> ToldState:
    """The state of rows that have read nothing."""
    return ToldState(jnp.full(b, -1, jnp.int32), jnp.zeros(b, jnp.int32), new_words(b))


def told_step(
    kind: str, n: float, state: ToldState, byte: Int[Array, " b"], active: Bool[Array, " b"]
) -> tuple[ToldState, Bool[Array, " b"]]:
    """The state behind one more byte of the active rows, and whether a boundary is at it."""
    words = state.words
    if kind in _RULES:
        words, _, starts = read_byte(state.words, byte, _RULES[kind], MAX_WORD)
        boundary = starts.any(axis=1)
    else:
        boundary = _by_place(kind, n, byte, state.before, state.place)
    new = ToldState(byte, state.place + 1, words)
    return jax.tree.map(lambda a, b: jnp.where(active, a, b), new, state), boundary | (state.place == 0)
