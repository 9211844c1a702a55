"""Dynamic chunking of H-Net (Hwang, Wang & Gu 2025, "Dynamic Chunking for End-to-End Hierarchical Sequence Modeling"):
the router, the smoothing that puts chunks back onto positions, the confidence and the ratio loss. Pure functions.

Where paper and released code differ, this follows the code, which the published weights need: the query is taken at
the previous position and the key at the current one, and a boundary asks for a probability strictly above one half.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bytelm.nn.layers import wide
from bytelm.nn.recurrence import linear_scan

SMOOTHING_FLOOR = 1e-4  # probabilities are kept this far from 0 and 1 in the smoothing, at a first position too


@jax.tree_util.register_dataclass
@dataclass
class Routing:
    """The router's decision at each position: probability of a boundary, and whether there is one."""

    probability: Float[Array, "b t"]
    boundary: Bool[Array, "b t"]

    @property
    def confidence(self) -> Float[Array, "b t"]:
        """Probability of what was decided (equation 8): p at a boundary, 1 - p elsewhere."""
        return jnp.where(self.boundary, self.probability, 1 - self.probability)


def segment_starts(segments: Int[Array, "b t"] | None, b: int, t: int) -> Bool[Array, "b t"]:
    """True at the first position of each row, and of each document where `segments` is given."""
    first = jnp.broadcast_to(jnp.arange(t) == 0, (b, t))
    if segments is None:
        return first
    return first | (jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0)


def unit(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """x / max(|x|, 1e-12), with a gradient of zero (not NaN) at zero."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def boundary_probability(before: Float[Array, "*b d"], now: Float[Array, "*b d"]) -> Float[Array, "*b"]:
    """(1 - cos(query, key)) / 2, clamped to [0, 1] (equation 4): high where neighbours differ."""
    cosine = jnp.sum(unit(before) * unit(now), axis=-1)
    return jnp.clip((1 - cosine) / 2, 0, 1)


def route(
    q: Float[Array, "b t d"], k: Float[Array, "b t d"], starts: Bool[Array, "b t"], valid: Bool[Array, "b t"]
) -> Routing:
    """Boundaries of rows: p compares the query of the position before with the key of each position, and is 1 where a
    row or document starts. There is no boundary at positions that are not `valid`."""
    before = jnp.pad(q[:, :-1], ((0, 0), (1, 0), (0, 0)))
    p = jnp.where(starts, 1.0, boundary_probability(before, k))
    return Routing(p, (p > 0.5) & valid)


def smooth(
    z: Float[Array, "b c d"], probability: Float[Array, "b c"], starts: Bool[Array, "b c"], form: str = "auto"
) -> Float[Array, "b c d"]:
    """The smoothing module (equation 5): s_j = P_j z_j + (1 - P_j) s_{j-1}, begun anew at each start, in float32.

    P is the boundary probability kept within [1e-4, 1 - 1e-4]: a start gives 0.9999 z, as in the released code.
    """
    kind = wide(z.dtype)
    p = jnp.clip(probability.astype(kind), SMOOTHING_FLOOR, 1 - SMOOTHING_FLOOR)
    return linear_scan(jnp.where(starts, 0, 1 - p), p[..., None] * z.astype(kind), form=form)


def smooth_behind(
    z: Float[Array, "b c d"], probability: Float[Array, "b c"], before: Float[Array, "b d"]
) -> Float[Array, "b c d"]:
    """`smooth` of chunks that follow others, which ended with `before`."""
    p = jnp.clip(probability.astype(before.dtype), SMOOTHING_FLOOR, 1 - SMOOTHING_FLOOR)
    scaled = p[..., None] * z.astype(before.dtype)
    return linear_scan(1 - p, scaled.at[:, 0].add((1 - p[:, :1]) * before), form="auto")


def smooth_step(z: Float[Array, "b d"], probability: Float[Array, " b"], before: Float[Array, "b d"]):
    """One step of `smooth`."""
    p = jnp.clip(probability.astype(before.dtype), SMOOTHING_FLOOR, 1 - SMOOTHING_FLOOR)[:, None]
    return p * z.astype(before.dtype) + (1 - p) * before


def straight_through(confidence: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Exactly 1, with the gradient of `confidence` (equation 7)."""
    return 1 + (confidence - jax.lax.stop_gradient(confidence))


def ratio_loss(fraction: Float[Array, ""], probability: Float[Array, ""], target: float) -> Float[Array, ""]:
    """N / (N - 1) ((N - 1) F G + (1 - F)(1 - G)) (equation 10): F the fraction of boundaries, G the mean probability,
    N the elements per chunk to aim at. 1 at F = G = 1 / N. No gradient goes through F."""
    f = jax.lax.stop_gradient(fraction)
    return target / (target - 1) * ((target - 1) * f * probability + (1 - f) * (1 - probability))


def boundary_means(routing: Routing, valid: Bool[Array, "b t"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """F and G over the valid positions of all rows: fraction of boundaries, mean probability."""
    count = jnp.maximum(jnp.sum(valid), 1).astype(jnp.float32)
    total = jnp.sum(jnp.where(valid, routing.probability, 0))
    return jnp.sum(routing.boundary) / count, total / count
