"""What a person who trains a chunking model watches, from one level's decisions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bytelm.models.base import Level

LONGEST = 1024  # chunk lengths from here on are counted as this
PERCENTILES = (10, 50, 90, 99)


def row_need(level: Level) -> Float[Array, ""]:
    """99th percentile over rows of the number of boundaries: the slots that a row needs."""
    return jnp.quantile(jnp.sum(level.boundary, axis=1).astype(jnp.float32), 0.99)


def length_percentiles(lengths: Int[Array, "b c"], real: Bool[Array, "b c"]) -> Float[Array, " p"]:
    """PERCENTILES of the real lengths, by counting (a sort of every position would cost more than the router)."""
    counts = jnp.zeros(LONGEST + 1, jnp.int32).at[jnp.clip(lengths, 0, LONGEST)].add(real.astype(jnp.int32))
    cumulative = jnp.cumsum(counts)
    wanted = jnp.array(PERCENTILES) / 100 * cumulative[-1]
    return jnp.argmax(cumulative >= wanted[:, None], axis=1).astype(jnp.float32)


def chunk_lengths(level: Level, row_length: Int[Array, " b"]) -> Int[Array, "b c"]:
    """Bytes from each boundary to the next one, or the row's end; of no use where there is no boundary."""
    starts = jnp.where(level.boundary, level.position, jnp.iinfo(jnp.int32).max)
    # The next boundary's position: a running minimum from the right, without the element itself.
    following = jax.lax.cummin(starts, axis=1, reverse=True)
    following = jnp.concatenate([following[:, 1:], jnp.full((starts.shape[0], 1), jnp.iinfo(jnp.int32).max)], axis=1)
    return jnp.minimum(following, row_length[:, None]) - level.position


def level_metrics(
    level: Level, inputs: Int[Array, "b t"], valid: Bool[Array, "b t"], slots: int | None
) -> dict[str, Float[Array, ""]]:
    """Scalars of one level over all rows; `slots` is its capacity (None: nothing can be dropped).

    bytes_per_chunk; length_pNN: percentiles of chunk lengths in bytes; dropped: boundaries without a slot;
    dropped_rows: share of rows with any; need: `row_need`; used: share of the slots in use; at_space: share of
    boundaries whose byte or the one before is ASCII white space; inside_character: share at UTF-8 continuation bytes.
    """
    count = jnp.sum(level.boundary, axis=1)
    total = jnp.maximum(jnp.sum(count), 1).astype(jnp.float32)
    space = (inputs == 32) | ((inputs >= 9) & (inputs <= 13))
    space |= jnp.pad(space[:, :-1], ((0, 0), (1, 0)))
    continuation = (inputs & 0xC0) == 0x80
    position = jnp.clip(level.position, 0, inputs.shape[1] - 1)

    def share(mask):
        return jnp.sum(level.boundary & jnp.take_along_axis(mask, position, axis=1)) / total

    percentiles = length_percentiles(chunk_lengths(level, jnp.sum(valid, axis=1)), level.boundary)
    slots = level.boundary.shape[1] if slots is None else slots
    dropped = jnp.maximum(count - slots, 0)
    out = {
        "bytes_per_chunk": jnp.sum(valid) / total,
        "dropped": jnp.sum(dropped).astype(jnp.float32),
        "dropped_rows": jnp.mean((dropped > 0).astype(jnp.float32)),
        "need": row_need(level),
        "used": jnp.mean(jnp.minimum(count, slots) / slots),
        "at_space": share(space),
        "inside_character": share(continuation),
    }
    return out | {f"length_p{p}": value for p, value in zip(PERCENTILES, percentiles)}
