"""T5's blocks, and the stack of one side: an encoder's or a decoder's."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from bytelm.config import T5Config
from bytelm.nn.layers import Dropout, Embedding, GatedGELU, RMSNorm
from bytelm.nn.relative import Attending, Keys, PositionBias, RelativeAttention
from bytelm.nn.stack import REMAT_POLICIES
from bytelm.parallel.mesh import shard, unroll


def _stds(config: T5Config, layers: int) -> dict[str, float]:
    """Standard deviations of the initial weights of a stack (MrT5's own, which shrink with the number of layers)."""
    f = 1 / math.sqrt(layers)
    inner = config.num_heads * config.head_dim
    return {
        "norm": f,
        "in": f / math.sqrt(config.d_model),
        "out": f / math.sqrt(inner),
        "mlp": f / math.sqrt(config.d_mlp),
    }


class T5Block(nnx.Module):
    """Self-attention, in a decoder attention to the encoder, and an MLP, each behind its norm."""

    def __init__(self, config: T5Config, std: dict[str, float], *, decoder: bool, rngs: nnx.Rngs):
        d = config.d_model

        def norm() -> RMSNorm:
            made = RMSNorm((d,), eps=config.norm_eps, dtype=config.dtype)
            made.scale[...] = jnp.full(d, std["norm"], jnp.float32)
            return made

        def attention() -> RelativeAttention:
            stds = (std["in"], std["in"], std["out"])
            return RelativeAttention(d, config.num_heads, config.head_dim, std=stds, dtype=config.dtype, rngs=rngs)

        self.attention_norm, self.attention = norm(), attention()
        if decoder:
            self.cross_norm, self.cross_attention = norm(), attention()
        self.mlp_norm = norm()
        self.mlp = GatedGELU(d, config.d_mlp, std=std["in"], out_std=std["mlp"], dtype=config.dtype, rngs=rngs)

    def _attend(self, r, bias, keys: Keys, how: Attending):
        x = self.attention_norm(r)
        y, excess = self.attention(x, *self.attention.project_keys(x), bias, keys, how)
        return r + how.dropout(y, 1).astype(r.dtype), excess

    def cross(self, r, k, v, keys: Keys, how: Attending):
        y, excess = self.cross_attention(self.cross_norm(r), k, v, None, keys, how)
        return r + how.dropout(y, 1).astype(r.dtype), excess

    def feed_forward(self, r, dropout: Dropout):
        return shard(r + dropout(self.mlp(self.mlp_norm(r), dropout), 1).astype(r.dtype), "batch", None, None)

    def encode(self, r, bias, keys: Keys, how: Attending):
        """(residual, excess of the scores)."""
        r, excess = self._attend(r, bias, keys, _part(how, 0))
        return self.feed_forward(r, how.dropout.fold(1)), excess

    def decode(self, r, bias, keys: Keys, states, source: Keys, how: Attending):
        """(residual, excess of the scores of the attention to the encoder's `states`)."""
        r, _ = self._attend(r, bias, keys, dataclasses.replace(_part(how, 0), measure=False))
        k, v = self.cross_attention.project_keys(states)
        r, excess = self.cross(r, k, v, source, _part(how, 2))
        return self.feed_forward(r, how.dropout.fold(1)), excess


def _part(how: Attending, n: Int[Array, ""] | int) -> Attending:
    return dataclasses.replace(how, dropout=how.dropout.fold(n))


class T5Stack(nnx.Module):
    """The blocks of one side, their position table and the closing norm. Weights of blocks are stacked [l, ...]."""

    def __init__(self, config: T5Config, *, decoder: bool, rngs: nnx.Rngs):
        self.config, self.decoder = config, decoder
        layers = config.decoder_layers if decoder else config.encoder_layers
        std = _stds(config, layers)
        self.bias = Embedding(config.buckets, config.num_heads, std=std["in"], dtype="float32", rngs=rngs)
        self.norm = RMSNorm((config.d_model,), eps=config.norm_eps, dtype=config.dtype)
        self.norm.scale[...] = jnp.full(config.d_model, std["norm"], jnp.float32)
        make = lambda key: T5Block(config, std, decoder=decoder, rngs=nnx.Rngs(params=key))  # noqa: E731
        self.blocks = jax.vmap(make)(jax.random.split(rngs.params(), layers))

    def position_bias(self, queries: Int[Array, "#b q"], keys: Int[Array, "#b s"]) -> PositionBias:
        c = self.config
        return PositionBias(self.bias.table[...], queries, keys, c.max_distance, not self.decoder).held()

    def run(self, r, first: int, end: int, how: Attending, body, *, training: bool):
        """Blocks first .. end - 1 over the residual `r`: body(block, r, how) -> (r, excess). Gives the mean excess.

        Each block's weights are looked up in the loop, which saves a copy of all of them (15 % of the time on CPU); in
        training they are handed to it, since the gradient of a look-up is as large as all blocks, for each block.
        """
        if first == end:
            return r, jnp.zeros((), r.dtype)
        c, numbers = self.config, jnp.arange(first, end)

        def looked_up(r, number):
            block = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, number, keepdims=False), self.blocks)
            return body(block, r, _part(how, number))

        if not training:
            r, excess = jax.lax.scan(looked_up, r, numbers, unroll=unroll() if c.scan_layers else True)
            return r, excess.mean()

        def layer(r, block):
            block, number = block
            return body(block, r, _part(how, number))

        looped = c.scan_layers and end - first > 1
        if c.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[c.remat], prevent_cse=not looped)
        some = jax.tree.map(lambda p: p[first:end], self.blocks)
        r, excess = jax.lax.scan(layer, r, (some, numbers), unroll=unroll() if c.scan_layers else True)
        return r, excess.mean()
