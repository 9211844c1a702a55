"""Linear maps, norm, MLP, embedding. Parameters are float32; each layer computes in the dtype it is given."""

import math
import string
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from bytelm.nn.products import contract
from bytelm.parallel.mesh import shard


def wide(dtype: DTypeLike) -> jnp.dtype:
    """float32, or `dtype` where that is wider: the type of norms, softmax, recurrences and losses."""
    return jnp.promote_types(dtype, jnp.float32)


class Linear(nnx.Module):
    """y[..., out] = sum over x[..., in] kernel[in, out]; both sides may span several axes, no bias."""

    def __init__(self, inputs: tuple[int, ...], outputs: tuple[int, ...], *, std: float, dtype: str, rngs: nnx.Rngs,
                 widen: bool = False, precision: jax.lax.Precision | None = None):  # fmt: skip
        """`std` 0 means 1 / sqrt(product of `inputs`); `widen` gives results in float32 or wider; `precision` is the
        matmul precision (default: jax's)."""
        scale = std or 1 / math.sqrt(math.prod(inputs))
        self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), (*inputs, *outputs), jnp.float32))
        self.input_axes = len(inputs)
        self.dtype = dtype
        self.output_dtype = wide(dtype) if widen else jnp.dtype(dtype)
        self.precision = precision

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        kernel = self.kernel[...].astype(self.dtype)
        letters = iter(string.ascii_lowercase)
        rows, inputs, outputs = (
            "".join(islice(letters, count))
            for count in (x.ndim - self.input_axes, self.input_axes, kernel.ndim - self.input_axes)
        )
        spec = f"{rows}{inputs},{inputs}{outputs}->{rows}{outputs}"
        return contract(spec, x.astype(self.dtype), kernel, self.output_dtype, self.precision)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last `len(shape)` axes, in float32 or wider; gives `dtype`."""

    def __init__(self, shape: tuple[int, ...], *, eps: float, dtype: str):
        self.scale = nnx.Param(jnp.ones(shape, jnp.float32))
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        scale = self.scale[...]
        axes = tuple(range(x.ndim - scale.ndim, x.ndim))
        x = x.astype(wide(x.dtype))
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axes, keepdims=True) + self.eps)
        return (x * scale).astype(self.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias, in float32 or wider; gives `dtype`."""

    def __init__(self, d: int, *, eps: float, dtype: str, bias: bool = True):
        self.scale = nnx.Param(jnp.ones(d, jnp.float32))
        if bias:
            self.bias = nnx.Param(jnp.zeros(d, jnp.float32))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        x = x.astype(wide(x.dtype))
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.eps) * self.scale[...]
        return (x + self.bias[...] if hasattr(self, "bias") else x).astype(self.dtype)


def make_norm(kind: str, d: int, *, eps: float, dtype: str) -> RMSNorm | LayerNorm:
    """`rms`, or `layer` without a bias."""
    return RMSNorm((d,), eps=eps, dtype=dtype) if kind == "rms" else LayerNorm(d, eps=eps, dtype=dtype, bias=False)


class HeadNorm(nnx.Module):
    """A norm of [.., heads, width]: of each head by itself (`head`), or of all together (`all`)."""

    def __init__(self, kind: str, heads: int, width: int, *, over: str, eps: float, dtype: str):
        self.over = over
        self.norm = make_norm(kind, width if over == "head" else heads * width, eps=eps, dtype=dtype)

    def __call__(self, x: Float[Array, "*b h k"]) -> Float[Array, "*b h k"]:
        joined = x if self.over == "head" else x.reshape(*x.shape[:-2], -1)
        return self.norm(joined).reshape(x.shape)


class Affine(Linear):
    """A linear map with an optional bias."""

    def __init__(self, inputs: tuple[int, ...], outputs: tuple[int, ...], *, bias: bool, dtype: str, rngs: nnx.Rngs):
        super().__init__(inputs, outputs, std=0, dtype=dtype, rngs=rngs)
        if bias:
            self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = super().__call__(x)
        return y + self.bias[...].astype(y.dtype) if hasattr(self, "bias") else y


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dropout:
    """Sets a share of numbers to 0 and scales the others up. Without a key (outside training) it does nothing."""

    rate: float = field(default=0.0, metadata=dict(static=True))
    key: Array | None = None

    def fold(self, n: Int[Array, ""] | int) -> "Dropout":
        """The dropout of part n, which draws for itself."""
        return self if self.key is None or not self.rate else Dropout(self.rate, jax.random.fold_in(self.key, n))

    def __call__(self, x: Float[Array, "..."], place: int) -> Float[Array, "..."]:
        """`x` with numbers dropped; each `place` in a block draws for itself."""
        if self.key is None or not self.rate:
            return x
        keep = jax.random.bernoulli(jax.random.fold_in(self.key, place), 1 - self.rate, x.shape)
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, "GLU variants improve transformer")."""

    activation = staticmethod(jax.nn.silu)

    def __init__(self, d: int, f: int, *, std: float, out_std: float, dtype: str, rngs: nnx.Rngs):
        self.gate = Linear((d,), (f,), std=std, dtype=dtype, rngs=rngs)
        self.up = Linear((d,), (f,), std=std, dtype=dtype, rngs=rngs)
        self.down = Linear((f,), (d,), std=out_std, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*b d"], dropout: Dropout | None = None) -> Float[Array, "*b d"]:
        # What the activation is made of is computed again in the backward pass: cheaper than to keep it.
        gated = jax.checkpoint(lambda gate, up: self.activation(gate) * up, prevent_cse=False)
        hidden = gated(self.gate(x), self.up(x))
        return self.down(hidden if dropout is None else dropout(hidden, 0))


class SwiGLU(GatedMLP):
    """A gated MLP with SiLU."""


class ReLUMLP(nnx.Module):
    """down(relu(up(x)))."""

    def __init__(self, d: int, f: int, *, std: float, out_std: float, dtype: str, rngs: nnx.Rngs):
        self.up = Linear((d,), (f,), std=std, dtype=dtype, rngs=rngs)
        self.down = Linear((f,), (d,), std=out_std, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return self.down(jax.nn.relu(self.up(x)))


class GatedGELU(GatedMLP):
    """A gated MLP with the tanh approximation of GELU, as T5 1.1 has it."""

    activation = staticmethod(partial(jax.nn.gelu, approximate=True))


class Embedding(nnx.Module):
    """A table [v, d] that turns ids into vectors and, where tied, vectors into logits."""

    def __init__(self, v: int, d: int, *, std: float, dtype: str, rngs: nnx.Rngs, split: bool = False):
        """`split`: too large a table to be whole on every device; its columns stay where they are."""
        self.table = nnx.Param((std or 1 / math.sqrt(d)) * jax.random.normal(rngs.params(), (v, d), jnp.float32))
        self.dtype, self.split = dtype, split

    def __call__(self, ids: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        # Gathered in float32 and cast after: the backward pass adds up thousands of positions in a few rows, which
        # bfloat16 cannot hold. A small table is whole on every device, so that rows stay where their batch is.
        rows = shard(self.table[...], None, "embed" if self.split else None)[ids]
        return shard(rows, "batch", *(("length",) if rows.ndim > 2 else ()), None).astype(self.dtype)

    def attend(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Logits x . table, in float32 or wider."""
        rows = string.ascii_lowercase[: x.ndim - 1]
        table = self.table[...].astype(self.dtype)
        return contract(f"{rows}y,zy->{rows}z", x.astype(self.dtype), table, wide(self.dtype))


def rotate(
    x: Float[Array, "b t h k"],
    positions: Int[Array, "b t"],
    dim: int,
    theta: float,
    stretch: tuple[float, ...] = (),
) -> Float[Array, "b t h k"]:
    """Rotary position embedding on the first `dim` features of each head, half-split pairs (Su et al. 2021, eq. 34).

    Feature i turns with feature i + dim / 2 at frequency theta^(-2i / dim), or as `stretched` makes it; angles are
    computed in float32 or wider.
    """
    frequency = theta ** (-jnp.arange(0, dim, 2, dtype=wide(x.dtype)) / dim)
    frequency = stretched(frequency, *stretch) if stretch else frequency
    angle = positions[..., None].astype(frequency.dtype) * frequency
    turned = turn(x[..., :dim], angle)
    return jnp.concatenate([turned, x[..., dim:]], -1) if dim < x.shape[-1] else turned


def stretched(
    frequency: Float[Array, " f"], factor: float, low: float, high: float, original: float
) -> Float[Array, " f"]:
    """Llama 3's rotary frequencies for longer contexts: wavelengths above original / low are stretched by `factor`,
    those below original / high are not, and those between partly."""
    share = (original * frequency / (2 * math.pi) - low) / (high - low)  # 1 where it stays, 0 where it is stretched
    share = jnp.clip(share, 0.0, 1.0)
    return (1 - share) * frequency / factor + share * frequency


def turn(x: Float[Array, "b t h k"], angle: Float[Array, "b t f"]) -> Float[Array, "b t h k"]:
    """Rotates feature i with feature i + k / 2 by the angles given, in float32 or wider."""
    kind = wide(x.dtype)
    cos, sin = jnp.cos(angle)[:, :, None].astype(kind), jnp.sin(angle)[:, :, None].astype(kind)
    a, b = jnp.split(x.astype(kind), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
