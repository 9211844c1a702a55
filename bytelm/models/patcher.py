"""Patches by entropy (BLT, Pagnoni et al. 2024, section 2.3): a small byte model of its own says how hard the next byte
is to foresee, and where it is hard enough, that byte begins a patch.

    threshold: H(x[t+1] | x[..t]) > threshold        rise: H(x[t+1] | x[..t]) - H(x[t] | x[..t-1]) > rise

Whether a patch begins behind a place is known with the bytes up to it: that is what is stored (`fires`). The first
patch of a document, or of a row that begins inside one, is one position long.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bytelm.config import EntropyConfig, FlatConfig
from bytelm.models.chunking import segment_starts
from bytelm.models.transformer import FlatModel
from bytelm.nn.cache import StackCache, newest
from bytelm.nn.segment import running_last
from bytelm.vocab import BLT_IDS, HNET_IDS, ByteIds


def flat_ids(inputs: Int[Array, "*b"], ids: ByteIds) -> Int[Array, "*b"]:
    """A family's ids in the flat family's numbers: bytes, 256 in front of a document; 257 to 259 for what the published
    BLT has besides."""
    if ids.offset == BLT_IDS.offset:
        symbols = jnp.array([257, 256, 258, 259], jnp.int32)
        return jnp.where(inputs < 4, symbols[jnp.clip(inputs, 0, 3)], inputs - 4)
    assert ids.start == HNET_IDS.start
    return jnp.where(inputs == ids.start, 256, inputs)


def _exact(function: Callable) -> Callable:
    """With whole float32 products: a cut must be the same wherever it is made."""

    @functools.wraps(function)
    def exactly(*arguments):
        with jax.default_matmul_precision("highest"):
            return function(*arguments)

    return exactly


@jax.tree_util.register_dataclass
@dataclass
class PatchState:
    """Where each row stands: the model's cache, its last entropy, and the patch so far."""

    model: StackCache
    entropy: Float[Array, " b"]
    length: Int[Array, " b"]  # of the patch so far, cuts by length aside
    next: Bool[Array, " b"]  # whether the byte to come begins a patch


@jax.tree_util.register_dataclass
@dataclass
class PatchTrail:
    """Of several inputs that were read and may be kept."""

    model: Any
    entropy: Float[Array, "b q"]
    length: Int[Array, "b q"]
    fires: Bool[Array, "b q"]  # whether a patch begins behind each

    def begins(self, state: PatchState) -> Bool[Array, "b q"]:
        """Whether a patch begins at each, given the state in front of them."""
        return jnp.concatenate([state.next[:, None], self.fires[:, :-1]], axis=1)


class Patcher(FlatModel):
    """The entropy model and its rule. Its weights are not trained with the network that it serves."""

    def __init__(self, config: EntropyConfig, *, rngs: nnx.Rngs):
        super().__init__(FlatConfig(stack=config.stack, tie_embeddings=config.tie_embeddings), rngs=rngs)
        self.rule = config

    def _entropy(self, y) -> Float[Array, "*b"]:
        logs = jax.nn.log_softmax(self._logits(y, self.rule.symbols), axis=-1)
        return -jnp.sum(jnp.exp(logs) * logs, axis=-1)

    @_exact
    def entropies(self, inputs: Int[Array, "b t"], segments: Int[Array, "b t"] | None = None) -> Float[Array, "b t"]:
        """Entropy, in nats, of what follows each position; inputs are the flat family's ids."""
        return self._entropy(self.stack(self.embed(inputs), segments=segments))

    def _beyond(self, entropy, before) -> Bool[Array, "*b"]:
        rule = self.rule
        high, rising = entropy > rule.threshold, entropy - before > rule.rise
        return {"threshold": high, "rise": rising, "both": high & rising}[rule.rule]

    def _decide(
        self, entropy: Float[Array, "b t"], segments: Int[Array, "b t"] | None
    ) -> tuple[Bool[Array, "b t"], Int[Array, "b t"]]:
        """Whether the rule has a patch begin behind each position, and the length of the patch so far, cuts by length
        aside."""
        b, t = entropy.shape
        starts = segment_starts(segments, b, t)
        fires = self._beyond(entropy, jnp.pad(entropy[:, :-1], ((0, 0), (1, 0)))) | starts
        position = jnp.broadcast_to(jnp.arange(t), (b, t))
        return fires, position + 1 - running_last(begins_of(fires, starts), position)

    def _too_long(self, length: Int[Array, "*b"]) -> Bool[Array, "*b"]:
        """Whether a patch is cut at this length."""
        longest = self.rule.max_patch
        return length % longest == 0 if longest else jnp.zeros(length.shape, bool)

    def fires(self, inputs: Int[Array, "b t"], segments: Int[Array, "b t"] | None = None) -> Bool[Array, "b t"]:
        """Whether a patch begins behind each position."""
        fires, length = self._decide(self.entropies(inputs, segments), segments)
        return fires | self._too_long(length)

    @_exact
    def behind(
        self, inputs: Int[Array, "b t"], lengths: Int[Array, " b"], max_length: int
    ) -> tuple[PatchState, Bool[Array, "b t"]]:
        """The state behind right-padded rows, and `fires` of their positions."""
        y, cache = self.stack.prefill(self.embed(inputs), lengths, max_length)
        entropy = self._entropy(y)
        rows, last = jnp.arange(len(inputs)), lengths - 1
        natural, length = self._decide(entropy, None)
        fires = natural | self._too_long(length)
        length = jnp.where(natural, 0, length)
        return PatchState(cache, entropy[rows, last], length[rows, last], fires[rows, last]), fires

    @_exact
    def read(self, inputs: Int[Array, " b"], state: PatchState, active: Bool[Array, " b"] | None = None) -> PatchState:
        """The state behind one more input of the active rows."""
        first = state.model.lengths == 0
        y, cache = self.stack.step(self.embed(inputs), state.model, active)
        entropy = self._entropy(y)
        length = state.length + 1
        fires = self._beyond(entropy, state.entropy) | first
        new = PatchState(cache, entropy, jnp.where(fires, 0, length), fires | self._too_long(length))
        if active is None:
            return new
        keep = lambda a, b: jnp.where(active, a, b)  # noqa: E731
        return PatchState(cache, *(keep(getattr(new, n), getattr(state, n)) for n in ("entropy", "length", "next")))

    @_exact
    def read_several(self, inputs: Int[Array, "b q"], state: PatchState) -> PatchTrail:
        """What `after` and the network need of several more inputs per row, read at once."""
        y, trail = self.stack.extend(self.embed(inputs), state.model)
        entropy = self._entropy(y)
        before = jnp.concatenate([state.entropy[:, None], entropy[:, :-1]], axis=1)
        first = (state.model.lengths == 0)[:, None] & (jnp.arange(inputs.shape[1]) == 0)
        natural = self._beyond(entropy, before) | first

        def one(length, natural):
            fires = natural | self._too_long(length + 1)
            length = jnp.where(natural, 0, length + 1)
            return length, (length, fires)

        _, (length, fires) = jax.lax.scan(one, state.length, natural.T)
        return PatchTrail(trail, entropy, length.T, fires.T)

    def after(self, state: PatchState, trail: PatchTrail, kept: Int[Array, " b"]) -> PatchState:
        """The state after the first `kept` inputs of a trail."""
        return PatchState(
            self.stack.keep(state.model, trail.model, kept), newest(trail.entropy, kept, state.entropy),
            newest(trail.length, kept, state.length), newest(trail.fires, kept, state.next),
        )  # fmt: skip

    def no_bytes(self, b: int, max_length: int) -> PatchState:
        """The state of rows that have read nothing."""
        zero = jnp.zeros(b, jnp.int32)
        return PatchState(self.stack.empty_cache(b, max_length), jnp.zeros(b), zero, jnp.ones(b, bool))


def begins_of(fires: Bool[Array, "b t"], starts: Bool[Array, "b t"]) -> Bool[Array, "b t"]:
    """Where patches begin: at documents' starts, and behind positions that fire."""
    return starts | jnp.pad(fires[:, :-1], ((0, 0), (1, 0)))
