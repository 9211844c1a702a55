"""MrT5's delete gate (Kallini et al. 2025): which bytes an encoder drops behind its first blocks, and what steers it.

A gate value lies between `scale` (deleted for certain) and 0 (kept). Soft deletion adds it to every later score of the
byte; hard deletion takes away the bytes whose value is not above `threshold`.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bytelm.config import DeletionConfig
from bytelm.nn.layers import RMSNorm, wide
from bytelm.vocab import T5_IDS

PAD = T5_IDS.start
RANDOM_SPREAD = 0.05  # of the share that the random gate deletes, from pass to pass
# ASCII white space and punctuation, at which the fixed gate starts a segment; and the end symbol.
_BOUNDARY_BYTES = np.array([*b"\t\n ", *range(33, 48), *range(58, 65), *range(91, 97), *range(123, 127)])


class DeleteGate(nnx.Module):
    """A linear gate on the residual stream, float32 at the highest precision: a decision must not flip by rounding."""

    def __init__(self, d: int, config: DeletionConfig, *, eps: float, rngs: nnx.Rngs):
        bound = math.sqrt(6 / (d + 1))  # Xavier's uniform draw for a map from d to 1
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), (d,), jnp.float32, -bound, bound))
        self.bias = nnx.Param(jnp.full((), config.gate_bias, jnp.float32))
        if config.gate_norm:
            self.norm = RMSNorm((d,), eps=eps, dtype="float32")
        self.config = config

    def __call__(
        self, h: Float[Array, "b t d"], source: Int[Array, "b t"], key: Array | None = None
    ) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
        """(gate values, the logits behind them). `key` draws noise, if the config asks for it."""
        x = h.astype(wide(h.dtype))
        x = self.norm(x) if self.config.gate_norm else x
        logits = jnp.einsum("btd,d->bt", x, self.kernel[...], precision=jax.lax.Precision.HIGHEST) + self.bias[...]
        if self.config.noise and key is not None:  # not centred, as in the released code: it leans to keeping
            logits += jax.random.gumbel(key, logits.shape, logits.dtype)
        return gate_values(logits, source, self.config.scale), logits


def gate_values(logits: Float[Array, "b t"], source: Int[Array, "b t"], scale: float) -> Float[Array, "b t"]:
    """scale * sigmoid(-logit); padding has `scale`."""
    return jnp.where(source == PAD, scale, scale * jax.nn.sigmoid(-logits))


def random_gate(source: Int[Array, "b t"], rate: float, scale: float, key: Array) -> Float[Array, "b t"]:
    """Deletes a share near `rate` (normal with RANDOM_SPREAD) of a batch's places, padding among them, drawn anew in
    every pass."""
    share, order = jax.random.split(key)
    count = (jnp.clip(rate + RANDOM_SPREAD * jax.random.normal(share), 0, 1) * source.size).astype(jnp.int32)
    rank = jax.random.permutation(order, source.size).reshape(source.shape)
    return jnp.where(rank < count, scale, 0.0)


def fixed_gate(source: Int[Array, "b t"], rate: float, scale: float) -> Float[Array, "b t"]:
    """Deletes the last share `rate` of each segment's bytes, row by row; white space, punctuation and the end symbol
    start a segment. (The released code pools segments over the rows of a batch, which is right for one row only.)"""
    starts = np.zeros(T5_IDS.offset + 256, bool)
    starts[_BOUNDARY_BYTES + T5_IDS.offset] = starts[T5_IDS.end] = True
    begins = jnp.asarray(starts)[jnp.minimum(source, len(starts) - 1)]
    t = source.shape[1]
    segment = jnp.cumsum(begins, axis=1)  # 0: what stands in front of the first boundary

    def row(segment: Int[Array, " t"]) -> Bool[Array, " t"]:
        lengths = jnp.zeros(t + 1, jnp.int32).at[segment].add(1)
        first = jnp.full(t + 1, t, jnp.int32).at[segment].min(jnp.arange(t, dtype=jnp.int32))
        # Rounded first: in float32, (1 - 0.7) * 10 is 3.0000001 and its ceiling would be 4.
        kept = jnp.ceil(jnp.round((1 - rate) * lengths.astype(jnp.float32), 4))
        return jnp.arange(t) - first[segment] >= kept[segment]

    return jnp.where(jax.vmap(row)(segment), scale, 0.0)


def keeps(
    values: Float[Array, "b t"], threshold: float | Float[Array, ""], visible: Bool[Array, "b t"] | None
) -> Bool[Array, "b t"]:
    """Which bytes hard deletion keeps: those above the threshold; the first byte of a row that would keep none."""
    keep = values > threshold
    if visible is not None:
        keep &= visible
    none = ~keep.any(axis=1, keepdims=True)
    return keep | (none & (jnp.arange(keep.shape[1]) == 0))


def keep_highest(keep: Bool[Array, "b t"], values: Float[Array, "b t"], capacity: int) -> Bool[Array, "b t"]:
    """The `capacity` kept bytes of each row with the highest gate values; of equal ones the earlier."""
    ranked = jnp.argsort(jnp.argsort(-jnp.where(keep, values, -jnp.inf), axis=1, stable=True), axis=1, stable=True)
    return keep & (ranked < capacity)


def mean_gate(values: Float[Array, "b t"], source: Int[Array, "b t"]) -> Float[Array, ""]:
    """Mean gate value over the bytes that are no padding."""
    real = source != PAD
    return jnp.sum(jnp.where(real, values, 0)) / jnp.maximum(real.sum(), 1)


def first_control(config: DeletionConfig) -> dict[str, Array]:
    """The controller before the first step: alpha, and its proportional and integral parts."""
    alpha = config.weight
    return {"alpha": jnp.float32(alpha), "p": jnp.float32(0), "i": jnp.float32(0)}


def next_control(config: DeletionConfig, state: dict[str, Array], rate: Array, step: Array) -> dict[str, Array]:
    """The controller after a step that deleted the share `rate` of the global batch's bytes.

    Error e = target - rate; p <- 0.9 p + 0.1 k_p e; i <- i + k_i e; alpha = max(0, p + i), or another floor. In the
    first `delay` steps nothing moves. The released code updates once per microbatch and device, so its k_i counts that
    many times more.
    """
    if not config.controller:
        return state
    error = config.rate - rate
    p, i = 0.9 * state["p"] + 0.1 * config.k_p * error, state["i"] + config.k_i * error
    new = {"alpha": jnp.maximum(config.weight_floor, p + i), "p": p, "i": i}
    return {name: jnp.where(step >= config.delay, new[name], state[name]) for name in state}


def capacity_slots(config: DeletionConfig, row: int, multiple: int = 8) -> int:
    """Slots of compact deletion in training where they are fixed."""
    share = config.capacity or min(1.2 - config.rate, 1.0)
    return min(-(-math.ceil(share * row) // multiple) * multiple, row)


def slot_sizes(row: int, count: int = 64, multiple: int = 8) -> Sequence[int]:
    """The few numbers of slots that exact compaction compiles for, rising up to the whole row."""
    step = max(-(-row // count), 1)
    step = -(-step // multiple) * multiple
    return sorted({min(step * (i + 1), row) for i in range(count)} | {row})


def deletion_metrics(
    config: DeletionConfig,
    values: Float[Array, "b t"],
    source: Int[Array, "b t"],
    keep: Bool[Array, "b t"],
    slots: int,
) -> dict[str, Array]:
    """What a step's log says: share of bytes deleted by the threshold, mean gate, the longest kept row as a share of
    the row, the share of kept bytes that found no slot, and the share of the slots in use."""
    real = source != PAD
    total = jnp.maximum(real.sum(), 1)
    kept = (keep & real).sum(axis=1)
    return {
        "deletion/rate": jnp.sum((values < config.threshold) & real) / total,
        "deletion/mean_gate": mean_gate(values, source),
        "deletion/longest": kept.max() / source.shape[1],
        "deletion/overflow": jnp.sum(jnp.maximum(kept - slots, 0)) / jnp.maximum(kept.sum(), 1),
        "deletion/used": jnp.minimum(kept, slots).mean() / slots,
    }
