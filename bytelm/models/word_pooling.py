"""What joins HAT's bytes and words: the pooling of a word's bytes, and the guides that its decoder adds."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bytelm.config import HATConfig
from bytelm.models.units import Units
from bytelm.nn.layers import HeadNorm, Linear, make_norm, rotate, wide
from bytelm.nn.segment import segment_softmax


def repeat_heads(x: Float[Array, "*b g k"], heads: int) -> Float[Array, "*b h k"]:
    """Heads that several others share, once for each of them."""
    return jnp.repeat(x, heads // x.shape[-2], axis=-2)


class WordPooling(nnx.Module):
    """One learned query per word attends to the word's own bytes; rotary phases are word number - byte number."""

    def __init__(self, c: HATConfig, *, rngs: nnx.Rngs):
        d, wider = c.encoder.d_model, c.backbone.d_model
        heads, kv, width = c.pool_heads, c.pool_kv_heads or c.pool_heads, c.backbone.d_model // c.pool_heads
        more = dict(std=c.init_std, dtype=c.dtype, rngs=rngs)
        self.query = nnx.Param(jax.random.normal(rngs.params(), (wider,), jnp.float32) * (c.init_std or wider**-0.5))
        self.q = Linear((wider,), (heads, width), **more)
        self.k, self.v = Linear((d,), (kv, width), **more), Linear((d,), (kv, width), **more)
        self.out = Linear((heads, width), (wider,), **more)
        if c.pool_norm != "none":
            norm = dict(over=c.pool_norm, eps=c.encoder.norm_eps, dtype=c.dtype)
            self.q_norm, self.k_norm = HeadNorm("rms", heads, width, **norm), HeadNorm("rms", kv, width, **norm)
        self.config = c

    def keys(self, h: Float[Array, "*b d"]) -> tuple[Array, Array]:
        """Keys (not turned) and values of bytes, a pair for each query head."""
        keys = self.k(h)
        if self.config.pool_norm != "none":
            keys = self.k_norm(keys)
        return repeat_heads(keys, self.config.pool_heads), repeat_heads(self.v(h), self.config.pool_heads)

    def scores(self, keys: Float[Array, "b t h k"], phase: Int[Array, "b t"]) -> Float[Array, "b t h"]:
        """q . k of bytes whose number is `phase` above that of their word: turning the key by the difference is turning
        both by their own."""
        kind = wide(keys.dtype)
        query = self.q(self.query[...])
        query = (query if self.config.pool_norm == "none" else self.q_norm(query)).astype(kind)
        c = self.config
        turned = rotate(keys, phase, keys.shape[-1], c.pool_theta, c.pool_stretch).astype(kind)
        return jnp.sum(turned * query, axis=-1) * keys.shape[-1] ** -0.5

    def __call__(self, h: Float[Array, "b t d"], units: Units) -> Float[Array, "b c e"]:
        keys, values = self.keys(h)
        scores = self.scores(keys, units.place - units.index)
        pooled = segment_softmax(scores, values, units.number, units.slots)
        return self.out(pooled.astype(h.dtype))


@jax.tree_util.register_dataclass
@dataclass
class PoolState:
    """The softmax over the bytes of a word so far: largest score, sum of weights, weighted sum of values."""

    top: Float[Array, "b h"]
    mass: Float[Array, "b h"]
    total: Float[Array, "b h k"]

    @property
    def mean(self) -> Float[Array, "b h k"]:
        """What the softmax gives; zero of no bytes."""
        return self.total / jnp.where(self.mass > 0, self.mass, 1)[..., None]

    def as_byte(self) -> tuple[Float[Array, "b h"], Float[Array, "b h k"]]:
        """Score and value of one byte that weighs as much as all so far."""
        return self.top + jnp.log(self.mass), self.mean

    def add(self, score: Float[Array, "b h"], value: Float[Array, "b h k"], rows: Bool[Array, " b"]) -> "PoolState":
        """With one more byte in some rows."""
        score = jnp.where(rows[:, None], score.astype(self.top.dtype), -jnp.inf)
        top = jnp.maximum(self.top, score)
        finite = jnp.where(jnp.isfinite(top), top, 0)
        old, new = jnp.exp(self.top - finite), jnp.exp(score - finite)
        total = old[..., None] * self.total + new[..., None] * jnp.where(rows[:, None, None], value, 0)
        return PoolState(top, old * self.mass + new, total)


def pool_state(scores: Float[Array, "b t h"], values: Float[Array, "b t h k"], mine: Bool[Array, "b t"]) -> PoolState:
    """The softmax over the bytes of each row that are `mine`."""
    scores = jnp.where(mine[..., None], scores, -jnp.inf)
    top = jnp.max(scores, axis=1)
    weight = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0)[:, None])
    return PoolState(top, weight.sum(axis=1), jnp.einsum("bth,bthk->bhk", weight, values.astype(weight.dtype)))


class GuideLayers(nnx.Module):
    """What each decoder layer adds of a guide: out(v(norm(guide))). Weights are stacked [l, ...].

    In the published code this is an attention over one key, whose query, key and softmax cannot change anything."""

    def __init__(self, c: HATConfig, layers: int, *, rngs: nnx.Rngs):
        d, wider = c.decoder.d_model, c.backbone.d_model
        heads, kv = c.guide_heads, c.guide_kv_heads or c.guide_heads

        def make(key):
            more = dict(std=c.init_std, dtype=c.dtype, rngs=nnx.Rngs(params=key))
            return OneGuide(c, Linear((wider,), (kv, d // heads), **more), Linear((heads, d // heads), (d,), **more))

        self.layer = jax.vmap(make)(jax.random.split(rngs.params(), layers))

    def __call__(self, guide: Float[Array, "*b e"]) -> Float[Array, "l *b d"]:
        _, out = jax.lax.scan(lambda _, layer: (None, layer(guide)), None, self.layer)
        return out


class OneGuide(nnx.Module):
    """One layer of `GuideLayers`."""

    def __init__(self, c: HATConfig, v: Linear, out: Linear):
        self.norm = make_norm("rms", c.backbone.d_model, eps=c.decoder.norm_eps, dtype=c.dtype)
        self.v, self.out = v, out

    def __call__(self, guide: Float[Array, "*b e"]) -> Float[Array, "*b d"]:
        return self.out(repeat_heads(self.v(self.norm(guide)), self.out.kernel.shape[0]))
