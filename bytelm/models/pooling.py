"""Two ways to shorten a sequence that MrT5 is compared with: learned boundaries with mean pooling (Nawrot et al. 2023)
and a strided convolution (CANINE; Clark et al. 2022)."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bytelm.nn.layers import RMSNorm, wide

TEMPERATURE = 0.5  # of the relaxed Bernoulli draw


def _xavier(rngs: nnx.Rngs, inputs: int, outputs: int) -> nnx.Param:
    bound = math.sqrt(6 / (inputs + outputs))
    return nnx.Param(jax.random.uniform(rngs.params(), (inputs, outputs), jnp.float32, -bound, bound))


@jax.tree_util.register_dataclass
@dataclass
class Pooled:
    """A shortened sequence: vectors in slots, which slots are filled, and where in the row each stands."""

    states: Float[Array, "b c d"]
    valid: Bool[Array, "b c"]
    position: Int[Array, "b c"]


class BoundaryPredictor(nnx.Module):
    """An MLP on the residual stream that says where segments end; float32 throughout."""

    def __init__(self, d: int, f: int, *, eps: float, rngs: nnx.Rngs):
        self.norm = RMSNorm((d,), eps=eps, dtype="float32")
        self.hidden, self.hidden_bias = _xavier(rngs, d, f), nnx.Param(jnp.full(f, -1.0, jnp.float32))
        self.out, self.out_bias = _xavier(rngs, f, 1), nnx.Param(jnp.full(1, -1.0, jnp.float32))

    def __call__(self, h: Float[Array, "b t d"]) -> Float[Array, "b t"]:
        """Logit of a segment's end at each byte."""
        exact = jax.lax.Precision.HIGHEST
        x = self.norm(h.astype(wide(h.dtype)))
        x = jnp.matmul(x, self.hidden[...], precision=exact) + self.hidden_bias[...]
        x = jax.nn.gelu(x, approximate=False)
        return (jnp.matmul(x, self.out[...], precision=exact) + self.out_bias[...])[..., 0]


def draw_boundaries(logits: Float[Array, "b t"], key: Array | None) -> Float[Array, "b t"]:
    """0 or 1 at each byte, with the relaxed probability's gradient. Drawn with `key`; without, the likelier one."""
    noise = 0.0 if key is None else jax.random.logistic(key, logits.shape, logits.dtype)
    soft = jax.nn.sigmoid((logits + noise) / TEMPERATURE)
    return (soft > 0.5) + soft - jax.lax.stop_gradient(soft)


def close_rows(boundaries: Float[Array, "b t"], real: Bool[Array, "b t"]) -> Float[Array, "b t"]:
    """Boundaries at real bytes only, and one at the last of them."""
    last = real & ~jnp.roll(real, -1, axis=1).at[:, -1].set(False)
    return jnp.where(last, 1.0, jnp.where(real, boundaries, 0.0))


def pool_segments(
    h: Float[Array, "b t d"], boundaries: Float[Array, "b t"], slots: int, *, rest: bool = False
) -> Pooled:
    """Mean of each segment, a boundary's byte being its last; what stands behind the last boundary is dropped.
    With `rest` its mean stands in the slot behind them, which is not valid: so the released code leaves it.

    The weight of a byte in its segment has the gradient of the number of boundaries in front of it, as in the relaxed
    membership matrix of the paper.
    """
    _, t, d = h.shape
    hard = jax.lax.stop_gradient(boundaries) > 0.5
    before = jnp.cumsum(boundaries, axis=1) - boundaries
    segment = jnp.cumsum(hard, axis=1) - hard
    count = hard.sum(axis=1)
    place = segment if rest else jnp.where(segment < count[:, None], segment, slots)
    weight = 1.0 + before - jax.lax.stop_gradient(before)

    def row(place, weight, h):
        total = jnp.zeros((slots, d), wide(h.dtype)).at[place].add(weight[:, None] * h, mode="drop")
        mass = jnp.zeros(slots, wide(h.dtype)).at[place].add(weight, mode="drop")
        first = jnp.full(slots, t, jnp.int32).at[place].min(jnp.arange(t, dtype=jnp.int32), mode="drop")
        return total / (mass[:, None] + 1e-9), first

    pooled, first = jax.vmap(row)(place, weight, h)
    valid = jnp.arange(slots) < count[:, None]
    return Pooled(pooled.astype(h.dtype), valid, jnp.where(valid, first, 0))


def binomial_nll(count: Float[Array, " b"], length: Float[Array, " b"], prior: float) -> Float[Array, ""]:
    """Mean over rows of -ln Binomial(length, prior)(count) / length: asks for a share `prior` of boundaries."""
    log_choose = (
        jax.scipy.special.gammaln(length + 1)
        - jax.scipy.special.gammaln(count + 1)
        - jax.scipy.special.gammaln(length - count + 1)
    )
    nats = -(log_choose + count * math.log(prior) + (length - count) * math.log1p(-prior))
    return jnp.mean(nats / jnp.maximum(length, 1))  # a row of padding has none


class StridedConvolution(nnx.Module):
    """GELU of a convolution whose stride is its width, behind a norm: one vector of every `stride` bytes."""

    def __init__(self, d: int, stride: int, *, eps: float, dtype: str, rngs: nnx.Rngs):
        self.norm = RMSNorm((d,), eps=eps, dtype=dtype)
        bound = 1 / math.sqrt(d * stride)  # PyTorch's default draw
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), (stride, d, d), jnp.float32, -bound, bound))
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (d,), jnp.float32, -bound, bound))
        self.dtype = dtype

    def __call__(self, h: Float[Array, "b t d"], real: Bool[Array, "b t"]) -> Pooled:
        """Every whole stretch of `stride` bytes pooled; a shorter one at the end of the row is dropped."""
        b, t, d = h.shape
        stride = self.kernel.shape[0]
        slots = t // stride
        x = self.norm(h)[:, : slots * stride].reshape(b, slots, stride, d)
        y = jnp.einsum("bcsd,sde->bce", x, self.kernel[...].astype(self.dtype), preferred_element_type=wide(self.dtype))
        y = jax.nn.gelu(y + self.bias[...], approximate=False).astype(h.dtype)
        valid = real[:, : slots * stride].reshape(b, slots, stride).any(axis=-1)
        position = jnp.broadcast_to(jnp.arange(slots) * stride, (b, slots))
        return Pooled(y, valid, position)
