"""The Mamba-2 mixer (Dao & Gu 2024), with separate kernels for its parts so that heads can be split over devices."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bytelm.config import StackConfig
from bytelm.nn.cache import Mamba2Cache, Mamba2Trail
from bytelm.nn.layers import Linear, RMSNorm, wide
from bytelm.nn.recurrence import causal_conv, ssd, ssd_behind, ssd_step, state_behind
from bytelm.parallel.mesh import shard


class Conv(nnx.Module):
    """Weights of a depthwise causal convolution: kernel [w, *channels], bias [*channels], PyTorch's default init."""

    def __init__(self, width: int, channels: tuple[int, ...], *, rngs: nnx.Rngs):
        bound = 1 / math.sqrt(width)
        draw = lambda shape: jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)  # noqa: E731
        self.kernel = nnx.Param(draw((width, *channels)))
        self.bias = nnx.Param(draw(channels))

    def __call__(self, x: Float[Array, "b t *c"], segments: Int[Array, "b t"] | None = None) -> Float[Array, "b t *c"]:
        # In float32: the backward pass adds up all positions in a handful of numbers.
        kind = wide(x.dtype)
        y = causal_conv(x.astype(kind), self.kernel[...].astype(kind), self.bias[...].astype(kind), segments)
        return y.astype(x.dtype)

    def step(self, past: Float[Array, "b w *c"], x: Float[Array, "b *c"]):
        """Output at x given the last width - 1 inputs, and the inputs to keep."""
        seen = jnp.concatenate([past, x[:, None]], axis=1)
        kind = wide(x.dtype)
        y = jnp.sum(seen.astype(kind) * self.kernel[...].astype(kind), axis=1) + self.bias[...].astype(kind)
        return y.astype(x.dtype), seen[:, 1:]


def _last_inputs(x: Float[Array, "b t *c"], lengths: Int[Array, " b"], count: int) -> Float[Array, "b w *c"]:
    """The `count` inputs before each row's length, newest last, zero before the start."""
    index = lengths[:, None] - count + jnp.arange(count)
    trailing = (1,) * (x.ndim - 2)
    taken = jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[1] - 1).reshape(*index.shape, *trailing), axis=1)
    return jnp.where((index >= 0).reshape(*index.shape, *trailing), taken, 0)


def _smoothed(conv: Conv, raw: Float[Array, "b t *c"], segments: Int[Array, "b t"] | None) -> Float[Array, "b t *c"]:
    """SiLU of a convolution, of which only the input is kept for the backward pass: to make it again is cheaper."""
    return jax.checkpoint(lambda x: jax.nn.silu(conv(x, segments)), prevent_cse=False)(raw)


class Mamba2(nnx.Module):
    """z, x, B, C, dt from the input; convolution and SiLU on x, B, C; the recurrence; gated norm; projection out."""

    def __init__(self, config: StackConfig, *, std: float, out_std: float, dtype: str, rngs: nnx.Rngs):
        d, s, heads = config.d_model, config.ssm, config.ssm_heads
        inner = (heads, s.head_dim)
        self.z = Linear((d,), inner, std=std, dtype=dtype, rngs=rngs)
        self.x = Linear((d,), inner, std=std, dtype=dtype, rngs=rngs)
        self.bc = Linear((d,), (2, s.d_state), std=std, dtype=dtype, rngs=rngs)
        self.dt = Linear((d,), (heads,), std=std, dtype=dtype, rngs=rngs)
        self.conv_x = Conv(s.conv_width, inner, rngs=rngs)
        self.conv_bc = Conv(s.conv_width, (2, s.d_state), rngs=rngs)
        # Mamba's init: dt log-uniform in [0.001, 0.1] (through the inverse of softplus), A uniform in [1, 16], D one.
        dt = jnp.exp(jax.random.uniform(rngs.params(), (heads,), jnp.float32, math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)))
        self.A_log = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (heads,), jnp.float32, 1.0, 16.0)))
        self.D = nnx.Param(jnp.ones((heads,), jnp.float32))
        self.norm = RMSNorm(inner, eps=config.norm_eps, dtype=dtype)
        self.out = Linear(inner, (d,), std=out_std, dtype=dtype, rngs=rngs)
        self.ssm = s

    def _rates(self, u):
        """dt > 0 [..., h] and A < 0 [h], float32 or wider."""
        kind = wide(u.dtype)
        dt = jax.nn.softplus(self.dt(u).astype(kind) + self.dt_bias[...].astype(kind))
        return dt, -jnp.exp(self.A_log[...].astype(kind))

    def _finish(self, y, x, z):
        # As a product of matrices: D's gradient is a long sum that cancels, and those are added up in several lanes.
        D, exact = self.D[...].astype(y.dtype), jax.lax.Precision.HIGHEST

        def gated(y, x, z):  # made again in the backward pass, too
            y = y + jnp.einsum("...hp,h->...hp", x.astype(y.dtype), D, precision=exact)
            return self.norm(y * jax.nn.silu(z.astype(y.dtype)))

        return self.out(jax.checkpoint(gated, prevent_cse=False)(y, x, z))

    def _mix(self, u, segments, valid):
        """Output [b, t, d], last state, and the inputs of both convolutions. Where not `valid`, the state stands."""
        raw_x, raw_bc = self.x(u), self.bc(u)
        x = shard(_smoothed(self.conv_x, raw_x, segments), "batch", "length", "heads", None)
        bc = _smoothed(self.conv_bc, raw_bc, segments)
        dt, A = self._rates(u)
        if valid is not None:
            dt = jnp.where(valid[..., None], dt, 0)
        y, state = ssd(x, dt, A, bc[:, :, 0], bc[:, :, 1], segments, chunk=self.ssm.chunk, form=self.ssm.form)
        return self._finish(y, x, self.z(u)), state, raw_x, raw_bc

    def __call__(
        self, u: Float[Array, "b t d"], positions: Int[Array, "b t"], segments: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """`positions` is not read: the recurrence knows the order."""
        return self._mix(u, segments, None)[0]

    def prefill(
        self, u: Float[Array, "b t d"], lengths: Int[Array, " b"], max_length: int
    ) -> tuple[Float[Array, "b t d"], Mamba2Cache]:
        """Forward over right-padded rows, and the cache after each row's `lengths` positions."""
        valid: Bool[Array, "b t"] = jnp.arange(u.shape[1]) < lengths[:, None]
        y, state, raw_x, raw_bc = self._mix(u, None, valid)
        keep = self.ssm.conv_width - 1
        return y, Mamba2Cache(_last_inputs(raw_x, lengths, keep), _last_inputs(raw_bc, lengths, keep), state)

    def step(
        self,
        u: Float[Array, "b d"],
        cache: Mamba2Cache,
        lengths: Int[Array, " b"],
        active: Bool[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b d"], Mamba2Cache]:
        """One position per row; rows that are not `active` keep their cache."""
        x, conv_x = self.conv_x.step(cache.conv_x, self.x(u))
        bc, conv_bc = self.conv_bc.step(cache.conv_bc, self.bc(u))
        x, bc = jax.nn.silu(x), jax.nn.silu(bc)
        dt, A = self._rates(u)
        state, y = ssd_step(cache.state, x, dt, A, bc[:, 0], bc[:, 1])
        new = Mamba2Cache(conv_x, conv_bc, state)
        if active is not None:
            choose = lambda a, b: jnp.where(active.reshape(-1, *(1,) * (a.ndim - 1)), a, b)  # noqa: E731
            new = jax.tree.map(choose, new, cache)
        return self._finish(y, x, self.z(u)), new

    def extend(
        self, u: Float[Array, "b q d"], cache: Mamba2Cache, lengths: Int[Array, " b"]
    ) -> tuple[Float[Array, "b q d"], Mamba2Trail]:
        """Several positions per row at once."""
        seen_x = jnp.concatenate([cache.conv_x, self.x(u)], axis=1)
        seen_bc = jnp.concatenate([cache.conv_bc, self.bc(u)], axis=1)
        past = self.ssm.conv_width - 1
        x, bc = jax.nn.silu(self.conv_x(seen_x)[:, past:]), jax.nn.silu(self.conv_bc(seen_bc)[:, past:])
        dt, A = self._rates(u)
        y = ssd_behind(cache.state, x, dt, A, bc[:, :, 0], bc[:, :, 1])
        return self._finish(y, x, self.z(u)), Mamba2Trail(seen_x, seen_bc, x, dt, bc[:, :, 0])

    def keep(
        self, cache: Mamba2Cache, trail: Mamba2Trail, lengths: Int[Array, " b"], kept: Int[Array, " b"]
    ) -> Mamba2Cache:
        """The cache after the first `kept` positions of a trail."""
        behind = kept + self.ssm.conv_width - 1
        past = lambda seen: _last_inputs(seen, behind, self.ssm.conv_width - 1)  # noqa: E731
        A = -jnp.exp(self.A_log[...].astype(trail.dt.dtype))
        state = state_behind(cache.state, trail.x, trail.dt, A, trail.B, kept)
        return Mamba2Cache(past(trail.seen_x), past(trail.seen_bc), state)

    def empty_cache(self, b: int, max_length: int) -> Mamba2Cache:
        keep, heads, p = self.ssm.conv_width - 1, self.D.shape[-1], self.ssm.head_dim
        return Mamba2Cache(
            jnp.zeros((b, keep, heads, p), self.x.dtype),
            jnp.zeros((b, keep, 2, self.ssm.d_state), self.x.dtype),
            jnp.zeros((b, heads, p, self.ssm.d_state), wide(jnp.dtype(self.x.dtype))),
        )
