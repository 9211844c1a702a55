"""What joins BLT's bytes and patches: attention between them, the pooling of a patch, and what its decoder reads."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bytelm.config import BLTConfig, StackConfig
from bytelm.models.units import Units
from bytelm.nn.compaction import expand
from bytelm.nn.layers import Linear, RMSNorm, wide
from bytelm.nn.segment import segment_max, segment_softmax


class CrossAttention(nnx.Module):
    """Attention between bytes and the vectors of patches, without positions: norms, projections, residual."""

    def __init__(self, c: StackConfig, *, std: float, doubled: bool, dtype: str, rngs: nnx.Rngs):
        d, more = c.d_model, dict(std=std, dtype=dtype, rngs=rngs)
        self.q_norm, self.k_norm = (RMSNorm((d,), eps=c.norm_eps, dtype=dtype) for _ in range(2))
        self.q = Linear((d,), (c.num_heads, c.head_width), **more)
        self.k, self.v = (Linear((d,), (c.kv_heads, c.head_width), **more) for _ in range(2))
        self.out = Linear((c.num_heads, c.head_width), (d,), **more)
        self.groups, self.residual = c.num_heads // c.kv_heads, 2 if doubled else 1

    def queries(self, x: Float[Array, "*b d"]) -> Float[Array, "*b h k"]:
        return self.q(self.q_norm(x))

    def keys(self, x: Float[Array, "*b d"]) -> tuple[Array, Array]:
        """Keys and values, a pair for each query head."""
        keys, values = self.shared_keys(x)
        return self.spread(keys), self.spread(values)

    def shared_keys(self, x: Float[Array, "*b d"]) -> tuple[Array, Array]:
        """Keys and values of the heads that there are."""
        x = self.k_norm(x)
        return self.k(x), self.v(x)

    def spread(self, x: Float[Array, "*b g k"]) -> Float[Array, "*b h k"]:
        """Heads that several query heads share, once for each of these."""
        return jnp.repeat(x, self.groups, axis=-2)

    def close(self, x: Float[Array, "*b d"], read: Float[Array, "*b h k"]) -> Float[Array, "*b d"]:
        """What was read, on top of the residual."""
        return self.residual * x + self.out(read.astype(self.out.dtype)).astype(x.dtype)

    def few(
        self, x: Float[Array, "*b d"], keys: Float[Array, "*b n h k"], values: Float[Array, "*b n h k"]
    ) -> Float[Array, "*b d"]:
        """Every position of x attends to n vectors of its own."""
        kind = wide(keys.dtype)
        q = self.queries(x).astype(kind) * keys.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.einsum("...hk,...nhk->...nh", q, keys.astype(kind)), axis=-2)
        return self.close(x, jnp.einsum("...nh,...nhk->...hk", weights, values.astype(kind)))


class PatchPooling(nnx.Module):
    """The vectors of a patch: its bytes' largest features, projected, attend to the bytes."""

    def __init__(self, c: BLTConfig, *, rngs: nnx.Rngs):
        d, more = c.encoder.d_model, dict(std=c.init_std, dtype=c.dtype, rngs=rngs)
        self.split = Linear((d,), (c.queries, d), **more)
        self.cross = CrossAttention(c.encoder, doubled=c.doubled, **more)

    def __call__(self, h: Float[Array, "b t d"], units: Units) -> Float[Array, "b c q d"]:
        start = self.split(segment_max(h, units.number, units.slots))
        queries = expand(self.cross.queries(start), jnp.minimum(units.number, units.slots - 1))  # b t q h k
        keys, values = self.cross.keys(h)
        kind = wide(keys.dtype)
        scores = jnp.einsum("btqhk,bthk->btqh", queries.astype(kind), keys.astype(kind)) * keys.shape[-1] ** -0.5
        b, t, q, heads = scores.shape
        many = jnp.broadcast_to(values[:, :, None], (b, t, q, *values.shape[2:])).reshape(b, t, q * heads, -1)
        read = segment_softmax(scores.reshape(b, t, -1), many, units.number, units.slots)
        return self.cross.close(start, read.reshape(b, units.slots, q, heads, -1))

    def one(
        self, top: Float[Array, "b d"], keys: Float[Array, "b n g k"], values: Float[Array, "b n g k"],
        mine: Bool[Array, "b n"],
    ) -> Float[Array, "b q d"]:  # fmt: skip
        """The vectors of one patch a row, of the bytes that are `mine`."""
        start = self.split(top)
        keys, values = self.cross.spread(keys), self.cross.spread(values)
        kind = wide(keys.dtype)
        queries = self.cross.queries(start).astype(kind) * keys.shape[-1] ** -0.5
        scores = jnp.einsum("bqhk,bnhk->bqhn", queries, keys.astype(kind))
        weights = jax.nn.softmax(jnp.where(mine[:, None, None], scores, jnp.finfo(kind).min), axis=-1)
        return self.cross.close(start, jnp.einsum("bqhn,bnhk->bqhk", weights, values.astype(kind)))


@jax.tree_util.register_dataclass
@dataclass
class PatchGuide:
    """In front of each decoder block, bytes attend to the vectors of the patch in their slot (`nn.stack.Guide`)."""

    cross: CrossAttention  # of all layers, stacked
    patches: Float[Array, "b c q d"]
    slot: Int[Array, "b t"]

    def at_layers(self, begin: int, count: int) -> CrossAttention:
        return jax.tree.map(lambda x: x[begin : begin + count], self.cross)

    def enter(self, r: Float[Array, "b t d"], layer: CrossAttention) -> Float[Array, "b t d"]:
        keys, values = (expand(x, self.slot) for x in layer.keys(self.patches))
        return layer.few(r, keys, values)


@jax.tree_util.register_dataclass
@dataclass
class PatchSlots:
    """The same, with the keys and values of the patches in slots."""

    cross: CrossAttention
    keys: Float[Array, "l b c q h k"]
    values: Float[Array, "l b c q h k"]
    slot: Int[Array, "b t"]

    def at_layers(self, begin: int, count: int) -> Any:
        return jax.tree.map(lambda x: x[begin : begin + count], (self.cross, self.keys, self.values))

    def enter(self, r: Float[Array, "b t d"], layer: Any) -> Float[Array, "b t d"]:
        cross, keys, values = layer
        return cross.few(r, expand(keys, self.slot), expand(values, self.slot))


@jax.tree_util.register_dataclass
@dataclass
class PatchStep:
    """The same in a step, with the keys and values of one patch a row."""

    cross: CrossAttention
    keys: Float[Array, "l b q h k"]
    values: Float[Array, "l b q h k"]

    def at_layers(self, begin: int, count: int) -> Any:
        return jax.tree.map(lambda x: x[begin : begin + count], (self.cross, self.keys, self.values))

    def enter(self, r: Float[Array, "b d"], layer: Any) -> Float[Array, "b d"]:
        cross, keys, values = layer
        return cross.few(r, keys, values)
