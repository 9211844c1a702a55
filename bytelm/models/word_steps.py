"""HAT's word rule on the device, byte by byte: what `data.words.Splitter` does on the host, for a batch of rows.

A byte that may be part of a longer character waits until that is whole, or is seen to be none. So a step decides over
none, one or several bytes: those that waited, oldest first, and the new one.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from bytelm.data.word_rule import automaton

WAITING = 3  # bytes that can wait
DECIDED = WAITING + 1  # bytes that one step can decide over


@jax.tree_util.register_dataclass
@dataclass
class WordState:
    """Where each row stands in its text."""

    state: Int[Array, "*b"]  # of the automaton
    waiting: Int[Array, "*b"]  # bytes of an unfinished character
    need: Int[Array, "*b"]  # bytes that this character has
    point: Int[Array, "*b"]  # its code point so far
    low: Int[Array, "*b"]  # what its next byte must lie between
    high: Int[Array, "*b"]
    length: Int[Array, "*b"]  # bytes of the word so far, without those that wait


def new_words(b: int) -> WordState:
    """Rows that have read nothing."""
    zero = jnp.zeros(b, jnp.int32)
    return WordState(zero, zero, zero, zero, zero, zero, zero)


def read_byte(
    s: WordState, byte: Int[Array, " b"], rule: str, max_word: int
) -> tuple[WordState, Int[Array, " b"], Bool[Array, "b n"]]:
    """The state behind one more byte per row, how many bytes are decided over (oldest first), and which of them begin a
    word. Bytes decided over are those that waited and the new one, but for a new one that begins to wait."""
    table = automaton(rule)
    move, begins = jnp.asarray(table.next), jnp.asarray(table.begins)
    classes = jnp.asarray(table.code_class)
    fits = (s.waiting > 0) & (byte >= s.low) & (byte <= s.high)
    broken = (s.waiting > 0) & ~fits  # what waited is no UTF-8: each byte is a word, then the new one is looked at
    state = jnp.where(broken, move[s.state, 0], s.state)
    length = jnp.where(broken, 1, s.length)

    lead = (byte >= 0xC2).astype(jnp.int32) + (byte >= 0xE0) + (byte >= 0xF0)
    lead = jnp.where((byte >= 0xC2) & (byte <= 0xF4), lead, 0)  # bytes that follow a first byte
    opens = ~fits & (lead > 0)
    point = jnp.where(fits, (s.point << 6) | (byte & 0x3F), jnp.where(opens, byte & (0x3F >> lead), byte))
    whole = jnp.where(fits, s.waiting + 1 == s.need, ~opens)
    lone = ~fits & (byte >= 0x80) & ~opens  # can be no part of UTF-8
    kind = jnp.where(lone, 0, classes[jnp.clip(point, 0, 0x10FFFF)].astype(jnp.int32))
    width = jnp.where(fits, s.need, 1)
    begin = begins[state, kind] | ((length + width > max_word) if max_word else False)
    state = jnp.where(whole, move[state, kind], state)
    length = jnp.where(whole, jnp.where(begin, width, length + width), length)

    special = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}
    low, high = jnp.full_like(byte, 0x80), jnp.full_like(byte, 0xBF)
    for first, (a, b) in special.items():
        low, high = jnp.where(opens & (byte == first), a, low), jnp.where(opens & (byte == first), b, high)
    waiting = jnp.where(whole, 0, jnp.where(fits, s.waiting + 1, 1))
    need = jnp.where(opens, lead + 1, s.need)

    decided = jnp.where(broken, s.waiting, 0) + jnp.where(whole, jnp.where(fits, s.need, 1), 0)
    place = jnp.arange(DECIDED)
    own = jnp.where(broken, s.waiting, 0)[:, None]  # place of the byte that `begin` speaks of
    starts = (broken[:, None] & (place < own)) | ((whole & begin)[:, None] & (place == own))
    return WordState(state, waiting, need, point, low, high, length), decided, starts & (place < decided[:, None])


@jax.tree_util.register_dataclass
@dataclass
class WordTrail:
    """What several more bytes per row say of words. Elements are the bytes that waited, then the new ones."""

    states: WordState  # behind each byte: b q
    begins: Bool[Array, "b s"]  # whether a word begins at each element, as far as it is known
    known: Int[Array, "b q"]  # how many words are known with each byte to have begun since
    decided: Int[Array, "b q"]  # how many elements are decided over then


def read_bytes(s: WordState, bytes_: Int[Array, "b q"], rule: str, max_word: int) -> WordTrail:
    """`read_byte` for several bytes."""

    def one(s, byte):
        waited = s.waiting
        s, _, starts = read_byte(s, byte, rule, max_word)
        return s, (s, waited, starts)

    b, q = bytes_.shape
    waited = s.waiting[:, None]
    _, found = jax.lax.scan(one, s, bytes_.T)
    states, before, starts = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), found)
    place = (waited + jnp.arange(q) - before)[..., None] + jnp.arange(DECIDED)
    at = jnp.where(starts, place, WAITING + q)
    begins = jnp.zeros((b, WAITING + q), bool).at[jnp.arange(b)[:, None, None], at].set(True, mode="drop")
    decided = waited + jnp.arange(1, q + 1) - states.waiting
    return WordTrail(states, begins, jnp.cumsum(starts.sum(axis=2), axis=1), decided)


def words_behind(inputs: Int[Array, "b t"], lengths: Int[Array, " b"], rule: str, max_word: int) -> WordState:
    """The state behind right-padded rows."""

    def one(s, column):
        byte, i = column
        new, _, _ = read_byte(s, byte, rule, max_word)
        return jax.tree.map(lambda a, b: jnp.where(i < lengths, a, b), new, s), None

    b, t = inputs.shape
    return jax.lax.scan(one, new_words(b), (inputs.T, jnp.arange(t)))[0]


def word_marks(
    inputs: Int[Array, "b t"], restarts: Bool[Array, "b t"], rule: str, max_word: int
) -> tuple[Bool[Array, "b t"], Int[Array, "b t"]]:
    """Whether a word begins at each byte of rows, and of how many that is known with each byte; the rule begins anew at
    `restarts`. Bytes at the end of which nothing is known yet count as beginning none."""
    b, t = inputs.shape

    def one(s, column):
        byte, restart, i = column
        s = jax.tree.map(lambda fresh, old: jnp.where(restart, fresh, old), new_words(b), s)
        waited = s.waiting
        s, decided, starts = read_byte(s, byte, rule, max_word)
        return s, (jnp.sum(starts, axis=1), starts, jnp.where(s.waiting == 1, i - waited, i + 1 - decided))

    _, (known, starts, first) = jax.lax.scan(one, new_words(b), (inputs.T, restarts.T, jnp.arange(t)))
    # Byte `first + n` is the n-th that this step decides over.
    place = first[..., None] + jnp.arange(DECIDED)
    rows = jnp.broadcast_to(jnp.arange(b)[None, :, None], place.shape)
    at = jnp.where(starts, place, t)
    return jnp.zeros((b, t), bool).at[rows, at].set(True, mode="drop"), known.T
