"""What every trainable network offers to the trainer and the generator."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
from jaxtyping import Array, Bool, Float, Int

from bytelm.vocab import ByteIds


@jax.tree_util.register_dataclass
@dataclass
class Level:
    """What one chunking level of a hierarchical model saw and decided. Its elements are the bytes (level 0) or the
    chunks of the level below it, in slots; empty slots are not valid and stand at the end."""

    position: Int[Array, "b c"]  # index of the row at which each element starts
    valid: Bool[Array, "b c"]
    probability: Float[Array, "b c"]  # of a boundary
    boundary: Bool[Array, "b c"]  # before any was dropped for want of a slot


@jax.tree_util.register_dataclass
@dataclass
class Output:
    """Logits over the family's ids, and what else a forward pass has to say."""

    logits: Float[Array, "b t v"]
    aux_loss: Float[Array, ""] | float = 0.0  # added to the mean cross-entropy, already weighted
    metrics: dict[str, Any] = field(default_factory=dict)  # scalars for the log
    levels: tuple[Level, ...] = ()  # chunking levels, outermost first
    scored: Bool[Array, "b t"] | None = None  # positions whose targets count in training; None: all
    need: Float[Array, " l"] | None = None  # slots that the 99th-percentile row needs, where no levels say so


class Network(Protocol):
    """A byte network. Ids, start and end symbols are those of `ids`."""

    ids: ByteIds

    def __call__(
        self,
        inputs: Int[Array, "b t"],
        segments: Int[Array, "b t"] | None = None,
        capacity: tuple[int, ...] | None = None,
    ) -> Output:
        """`capacity` is the number of chunk slots at each level; None: as many as can be needed."""
        ...

    def prefill(
        self, inputs: Int[Array, "b t"], lengths: Int[Array, " b"], max_length: int
    ) -> tuple[Float[Array, "b v"], Any]: ...

    def step(self, inputs: Int[Array, " b"], cache: Any) -> tuple[Float[Array, "b v"], Any]: ...
