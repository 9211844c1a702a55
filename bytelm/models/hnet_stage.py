"""The stages of an H-Net (`models/hnet.py`): a chunking one with the deeper ones inside it, and the innermost stack."""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bytelm.config import HNetConfig
from bytelm.models.base import Level
from bytelm.models.chunking import (
    Routing,
    boundary_probability,
    route,
    segment_starts,
    smooth,
    smooth_behind,
    smooth_step,
    straight_through,
)
from bytelm.models.patcher import PatchState
from bytelm.models.told import ToldState
from bytelm.nn.cache import StackCache, if_needed, keep_some, newest, pick
from bytelm.nn.compaction import compact, expand, newest_slot, slot_positions
from bytelm.nn.layers import Linear, wide
from bytelm.nn.stack import Stack, residual_additions


@jax.tree_util.register_dataclass
@dataclass
class Row:
    """Which elements of a stage's sequence are real, of which document they are, and where in the row they start."""

    position: Int[Array, "b t"]
    valid: Bool[Array, "b t"]
    segments: Int[Array, "b t"] | None  # None: one document per row
    told: Bool[Array, "b t"] | None = None  # boundaries of a rule in the router's place


@jax.tree_util.register_dataclass
@dataclass
class StageCache:
    """What a chunking stage keeps between its steps."""

    encoder: StackCache
    decoder: StackCache
    last: Float[Array, "b d"]  # encoder output of the step before
    value: Float[Array, "b e"]  # smoothed output of the inner network at the newest chunk
    inner: Any  # StageCache, or StackCache of the innermost stage
    told: ToldState | PatchState | None = None  # of a rule in the router's place


@jax.tree_util.register_dataclass
@dataclass
class Pending:
    """A step between encoder and decoder: what the inner network may still have to be asked for."""

    encoded: Float[Array, "b d"]
    residual: Float[Array, "b d"]
    probability: Float[Array, " b"]
    boundary: Bool[Array, " b"]


@jax.tree_util.register_dataclass
@dataclass
class StageTrail:
    """Of several elements that a stage has read and may keep."""

    encoder: Any
    decoder: Any
    encoded: Float[Array, "b q d"]
    boundary: Bool[Array, "b q"]
    smoothed: Float[Array, "b q e"]  # in slots, one for each boundary
    inner: Any


class Widening(nnx.Module):
    """Fills vectors up to a stage's width with a learned vector, and cuts them back."""

    def _init_width(self, outer: int, d: int) -> None:
        self.outer = outer
        if d > outer:
            self.pad = nnx.Param(jnp.zeros((d - outer,), jnp.float32))

    def _widen(self, x):
        if not hasattr(self, "pad"):
            return x
        pad = jnp.broadcast_to(self.pad[...].astype(x.dtype), (*x.shape[:-1], self.pad.shape[0]))
        return jnp.concatenate([x, pad], axis=-1)


class Innermost(Widening):
    """The stage that does not chunk: one stack."""

    def __init__(self, config: HNetConfig, stage: int, outer: int, *, out_scale: float, rngs: nnx.Rngs):
        self._init_width(outer, config.d_model[stage])
        self.main = Stack(
            config.stack(stage, "main"), std=config.init_std, dtype=config.dtype, rngs=rngs, out_scale=out_scale
        )

    def __call__(self, x, row: Row, capacity):
        """(output of the incoming width, no levels)."""
        return self.main(self._widen(x), segments=row.segments)[..., : self.outer], ()

    def prefill(self, x, lengths, max_length):
        y, cache = self.main.prefill(self._widen(x), lengths, max_length)
        return y[..., : self.outer], cache

    def step(self, x, cache, active):
        y, cache = self.main.step(self._widen(x), cache, active)
        return y[..., : self.outer], cache

    def extend(self, x, cache):
        y, trail = self.main.extend(self._widen(x), cache)
        return y[..., : self.outer], trail

    def keep(self, cache, trail, kept):
        return self.main.keep(cache, trail, kept)

    def empty_cache(self, b: int, max_length: int) -> StackCache:
        return self.main.empty_cache(b, max_length)


class Router(nnx.Module):
    """Query and key projections of the boundary decision; identity at first, float32 at the highest precision."""

    def __init__(self, d: int, *, rngs: nnx.Rngs):
        exact = dict(std=1.0, dtype="float32", precision=jax.lax.Precision.HIGHEST, rngs=rngs)
        self.q, self.k = Linear((d,), (d,), **exact), Linear((d,), (d,), **exact)
        self.q.kernel[...] = self.k.kernel[...] = jnp.eye(d, dtype=jnp.float32)


class Residual(nnx.Module):
    """The path around the inner network: a float32 projection (at jax's default matmul precision) with a bias; 0 at
    first, but for the bias, which keeps PyTorch's default draw as in the released code."""

    def __init__(self, d: int, *, rngs: nnx.Rngs):
        bound = 1 / math.sqrt(d)
        self.kernel = nnx.Param(jnp.zeros((d, d), jnp.float32))
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (d,), jnp.float32, -bound, bound))

    def __call__(self, e: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return e.astype(jnp.float32) @ self.kernel[...] + self.bias[...]


class Stage(Widening):
    """A chunking stage and, inside it, all deeper ones."""

    def __init__(self, config: HNetConfig, stage: int, outer: int, *, additions: int, rngs: nnx.Rngs):
        """`outer` is the width of the stage around it, `additions` the residual additions in the stacks around it."""
        d = config.d_model[stage]
        self._init_width(outer, d)
        encoder, decoder = config.stack(stage, "encoder"), config.stack(stage, "decoder")
        additions += residual_additions(encoder.layout) + residual_additions(decoder.layout)
        options = dict(std=config.init_std, dtype=config.dtype, out_scale=1 / math.sqrt(additions), rngs=rngs)
        self.encoder, self.decoder = Stack(encoder, **options), Stack(decoder, **options)
        if stage or config.chunker == "learned":
            self.router = Router(d, rngs=rngs)
        self.residual = Residual(d, rngs=rngs)
        self.inner = make_stage(config, stage + 1, d, additions, rngs)
        self.dtype = config.dtype

    def _route(self, e, row: Row) -> Routing:
        if row.told is not None:
            boundary = row.told & row.valid
            return Routing(boundary.astype(jnp.float32), boundary)
        starts = segment_starts(row.segments, *e.shape[:2])
        return route(self.router.q(e), self.router.k(e), starts, row.valid)

    def _chunks(self, e, routing: Routing, row: Row, slots: int):
        """(vectors, probabilities, row) of the chunks, in `slots` slots."""
        at = slot_positions(routing.boundary, slots)
        segments = None if row.segments is None else compact(row.segments, at)
        inner = Row(compact(row.position, at), at < e.shape[1], segments)
        return compact(e, at), compact(routing.probability, at), inner

    def _join(self, smoothed, routing: Routing, residual, segments=None, slot_segments=None):
        """Chunks back onto positions, through the straight-through confidence, beside the residual. A document that
        found no slot reads none: it has its residual only."""
        slots = newest_slot(routing.boundary, smoothed.shape[1])
        up = expand(smoothed, slots)
        if segments is not None and slot_segments is not None:
            up = jnp.where((expand(slot_segments, slots) == segments)[..., None], up, 0)
        return (up * straight_through(routing.confidence)[..., None] + residual).astype(self.dtype)

    def __call__(self, x, row: Row, capacity: tuple[int, ...] | None):
        """(output of the incoming width, this level and the deeper ones)."""
        e = self.encoder(self._widen(x), segments=row.segments)
        routing = self._route(e, row)
        slots = e.shape[1] if capacity is None else capacity[0]
        chunks, probability, inner_row = self._chunks(e, routing, row, slots)
        z, levels = self.inner(chunks, inner_row, None if capacity is None else capacity[1:])
        smoothed = smooth(z, probability, segment_starts(inner_row.segments, *probability.shape))
        joined = self._join(smoothed, routing, self.residual(e), row.segments, inner_row.segments)
        y = self.decoder(joined, segments=row.segments)
        level = Level(row.position, row.valid, routing.probability, routing.boundary)
        return y[..., : self.outer], (level, *levels)

    def prefill(self, x, lengths: Int[Array, " b"], max_length: int, told: Any = None):
        """Forward over right-padded rows, at full capacity, and the cache after `lengths` elements (at least 1).
        `told`: boundaries of a rule, and its state behind them."""
        b, t = x.shape[:2]
        e, encoder = self.encoder.prefill(self._widen(x), lengths, max_length)
        index = jnp.broadcast_to(jnp.arange(t), (b, t))
        row = Row(index, index < lengths[:, None], None, told and told[0])
        routing = self._route(e, row)
        chunks, probability, _ = self._chunks(e, routing, row, t)
        count = jnp.sum(routing.boundary, axis=1)
        z, inner = self.inner.prefill(chunks, count, max_length)
        smoothed = smooth(z, probability, segment_starts(None, b, t))
        y, decoder = self.decoder.prefill(self._join(smoothed, routing, self.residual(e)), lengths, max_length)
        last = pick(e, lengths - 1)
        cache = StageCache(encoder, decoder, last, pick(smoothed, count - 1), inner, told and told[1])
        return y[..., : self.outer], cache

    def front(
        self, x, cache: StageCache, active: Bool[Array, " b"], told: Bool[Array, " b"] | None = None
    ) -> tuple[Pending, StageCache]:
        """The first half of a step, up to the router or the boundaries `told` in its place."""
        first = cache.encoder.lengths == 0
        e, encoder = self.encoder.step(self._widen(x), cache.encoder, active)
        if told is None:
            p = jnp.where(first, 1.0, boundary_probability(self.router.q(cache.last), self.router.k(e)))
        else:
            p = told.astype(jnp.float32)
        pending = Pending(e, self.residual(e), p, (p > 0.5) & active)
        last = jnp.where(active[:, None], e, cache.last)
        return pending, replace(cache, encoder=encoder, last=last)

    def ask_inner(self, pending: Pending, cache: StageCache, rows: Bool[Array, " b"]) -> StageCache:
        """Runs the inner network for `rows`, if there are any: only their state advances."""

        def run(cache):
            z, inner = self.inner.step(pending.encoded, cache.inner, rows)
            value = jnp.where(rows[:, None], smooth_step(z, pending.probability, cache.value), cache.value)
            return replace(cache, value=value, inner=inner)

        return jax.lax.cond(jnp.any(rows), run, lambda cache: cache, cache)

    def back(self, pending: Pending, cache: StageCache, active: Bool[Array, " b"]):
        """The second half of a step: the decoder."""
        y, decoder = self.decoder.step((cache.value + pending.residual).astype(self.dtype), cache.decoder, active)
        return y[..., : self.outer], replace(cache, decoder=decoder)

    def step(self, x, cache: StageCache, active: Bool[Array, " b"]):
        """One element per active row; rows may be at different places of their chunks."""
        pending, cache = self.front(x, cache, active)
        cache = self.ask_inner(pending, cache, pending.boundary)
        return self.back(pending, cache, active)

    def extend(
        self, x: Float[Array, "b q e"], cache: StageCache, told: Bool[Array, "b q"] | None = None
    ) -> tuple[Float[Array, "b q e"], StageTrail]:
        """Several elements per row at once, whose chunks the inner network reads at once; where no row has a boundary,
        it is not asked. `told`: boundaries of a rule in the router's place."""
        q = x.shape[1]
        e, encoder = self.encoder.extend(self._widen(x), cache.encoder)
        if told is None:
            before = jnp.concatenate([cache.last[:, None], e[:, :-1]], axis=1)
            p = boundary_probability(self.router.q(before), self.router.k(e))
            p = jnp.where((cache.encoder.lengths == 0)[:, None] & (jnp.arange(q) == 0), 1.0, p)
        else:
            p = told.astype(jnp.float32)
        boundary = p > 0.5
        at = slot_positions(boundary, q)
        chunks, probability = compact(e, at), compact(p, at)

        def run():
            z, inner = self.inner.extend(chunks, cache.inner)
            return smooth_behind(z, probability, cache.value), inner

        smoothed, inner = if_needed(jnp.any(boundary), run)
        slot = jnp.cumsum(boundary, axis=1) - 1
        value = jnp.where((slot < 0)[..., None], cache.value[:, None], expand(smoothed, jnp.maximum(slot, 0)))
        y, decoder = self.decoder.extend((value + self.residual(e)).astype(self.dtype), cache.decoder)
        return y[..., : self.outer], StageTrail(encoder, decoder, e, boundary, smoothed, inner)

    def keep(self, cache: StageCache, trail: StageTrail, kept: Int[Array, " b"]) -> StageCache:
        """The cache after the first `kept` elements of a trail, and so after the chunks that begin in them."""
        chunks = jnp.sum(trail.boundary & (jnp.arange(trail.boundary.shape[1]) < kept[:, None]), axis=1)
        inner = keep_some(self.inner, cache.inner, trail.inner, chunks)
        return replace(
            cache, encoder=self.encoder.keep(cache.encoder, trail.encoder, kept),
            decoder=self.decoder.keep(cache.decoder, trail.decoder, kept),
            last=newest(trail.encoded, kept, cache.last), inner=inner,
            value=newest(trail.smoothed, chunks, cache.value),
        )  # fmt: skip

    def empty_cache(self, b: int, max_length: int) -> StageCache:
        d = self.residual.bias.shape[0]
        return StageCache(
            self.encoder.empty_cache(b, max_length), self.decoder.empty_cache(b, max_length),
            jnp.zeros((b, d), self.dtype), jnp.zeros((b, d), wide(jnp.dtype(self.dtype))),
            self.inner.empty_cache(b, max_length),
        )  # fmt: skip


def make_stage(config: HNetConfig, stage: int, outer: int, additions: int, rngs: nnx.Rngs) -> Stage | Innermost:
    if stage < config.levels:
        return Stage(config, stage, outer, additions=additions, rngs=rngs)
    additions += residual_additions(config.stack(stage, "main").layout)
    return Innermost(config, stage, outer, out_scale=1 / math.sqrt(additions), rngs=rngs)
