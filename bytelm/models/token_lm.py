"""Decoder-only language models over tokens: GPT-2, Llama, Mistral, Qwen 2 and 3 and their kin, for the byte view.

Weights are read, never trained here. A batch of inputs need not be rows of text: `extend` takes any set of tokens, each
with its position and the slots of the cache that it may look at, so that the nodes of a tree go through at once.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bytelm.config import ConfigError
from bytelm.nn.attend import attend, causal_mask
from bytelm.nn.attention import attend_cached
from bytelm.nn.cache import AttentionCache
from bytelm.nn.layers import Affine, Embedding, LayerNorm, Linear, RMSNorm, stretched, turn, wide
from bytelm.parallel.mesh import shard


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """How rotary frequencies are stretched for longer contexts."""

    kind: Literal["linear", "llama3"]
    factor: float
    low: float = 1.0  # llama3: wavelengths longer than original / low are stretched
    high: float = 4.0  # and those shorter than original / high are not
    original: int = 8192  # context the model was first trained on


@dataclass(frozen=True, kw_only=True)
class TokenLMConfig:
    """A token decoder; read from a published model's config, so it has no YAML of its own."""

    vocabulary: int
    d_model: int
    layers: int
    num_heads: int
    kv_heads: int
    head_dim: int
    d_mlp: int
    context: int  # longest position it knows
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    gated: bool = True  # down(activation(gate(x)) * up(x)); else down(activation(up(x)))
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of each head's queries and keys
    rope_theta: float = 1e4  # 0: learned positions
    scaling: RotaryScaling | None = None
    tie_embeddings: bool = False
    window: int = 0  # tokens that attention looks back, itself among them; 0: all
    windowed: tuple[bool, ...] = ()  # which layers have the window; empty: all
    dtype: str = "float32"

    def __post_init__(self):
        if self.num_heads % self.kv_heads:
            raise ConfigError(f"{self.num_heads} query heads do not divide over {self.kv_heads} key heads")
        if self.windowed and len(self.windowed) != self.layers:
            raise ConfigError(f"windows are given for {len(self.windowed)} layers of {self.layers}")

    def layer_windows(self) -> tuple[int, ...]:
        """Window of each layer; 0: none."""
        return tuple(self.window if on else 0 for on in self.windowed or (True,) * self.layers)


def rotary_frequencies(config: TokenLMConfig) -> Float[Array, " f"]:
    """Angle per position of each pair of features (Su et al. 2021; Llama 3's stretching)."""
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    s = config.scaling
    if s is None:
        return frequency
    if s.kind == "linear":
        return frequency / s.factor
    return stretched(frequency, s.factor, s.low, s.high, s.original)


_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class TokenBlock(nnx.Module):
    """Attention and MLP, each behind its norm."""

    def __init__(self, c: TokenLMConfig, *, rngs: nnx.Rngs):
        d, more = c.d_model, dict(dtype=c.dtype, rngs=rngs)
        self.config = c
        self.attention_norm, self.mlp_norm = norm(c), norm(c)
        self.q = Affine((d,), (c.num_heads, c.head_dim), bias=c.qkv_bias, **more)
        self.k = Affine((d,), (c.kv_heads, c.head_dim), bias=c.qkv_bias, **more)
        self.v = Affine((d,), (c.kv_heads, c.head_dim), bias=c.qkv_bias, **more)
        self.out = Affine((c.num_heads, c.head_dim), (d,), bias=c.out_bias, **more)
        if c.qk_norm:
            self.q_norm = RMSNorm((c.head_dim,), eps=c.norm_eps, dtype=c.dtype)
            self.k_norm = RMSNorm((c.head_dim,), eps=c.norm_eps, dtype=c.dtype)
        if c.gated:
            self.gate = Affine((d,), (c.d_mlp,), bias=c.mlp_bias, **more)
        self.up = Affine((d,), (c.d_mlp,), bias=c.mlp_bias, **more)
        self.down = Affine((c.d_mlp,), (d,), bias=c.mlp_bias, **more)

    def project(self, x: Float[Array, "b t d"], angle: Float[Array, "b t f"] | None):
        """Queries, keys and values; the first two turned to their positions."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if angle is not None:
            q, k = turn(q, angle), turn(k, angle)
        return shard(q, None, None, "heads", None), shard(k, None, None, "kv_heads", None), v

    def feed_forward(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        activation = _ACTIVATIONS[self.config.activation]
        return self.down(activation(self.gate(x)) * self.up(x) if self.config.gated else activation(self.up(x)))


def norm(c: TokenLMConfig) -> RMSNorm | LayerNorm:
    """The norm of a model."""
    if c.norm == "layer":
        return LayerNorm(c.d_model, eps=c.norm_eps, dtype=c.dtype)
    return RMSNorm((c.d_model,), eps=c.norm_eps, dtype=c.dtype)


class TokenLM(nnx.Module):
    """Embedding, blocks (weights stacked [l, ...]), norm, head."""

    def __init__(self, config: TokenLMConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.embed = Embedding(c.vocabulary, c.d_model, std=0, dtype=c.dtype, rngs=rngs)
        if not c.rope_theta:
            self.positions = Embedding(c.context, c.d_model, std=0, dtype=c.dtype, rngs=rngs)
        make = lambda key: TokenBlock(c, rngs=nnx.Rngs(params=key))  # noqa: E731
        self.blocks = jax.vmap(make)(jax.random.split(rngs.params(), c.layers))
        self.norm = norm(c)
        if not c.tie_embeddings:
            self.head = Linear((c.d_model,), (c.vocabulary,), std=0, dtype=c.dtype, rngs=rngs, widen=True)

    def _enter(self, ids: Int[Array, "b t"], positions: Int[Array, "b t"]):
        x = self.embed(ids).astype(wide(self.config.dtype))
        if not self.config.rope_theta:
            return x + self.positions(positions).astype(x.dtype), None
        return x, positions[..., None].astype(jnp.float32) * rotary_frequencies(self.config)

    def _logits(self, x):
        x = self.norm(x)
        return self.embed.attend(x) if self.config.tie_embeddings else self.head(x)

    def _windows(self) -> Int[Array, " l"]:
        far = 1 << 30
        return jnp.array([w or far for w in self.config.layer_windows()])

    def __call__(self, ids: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        """Logits of the token after each one, in float32 or wider, for rows of text."""
        b, t = ids.shape
        places = jnp.broadcast_to(jnp.arange(t), (b, t))
        x, angle = self._enter(ids, places)
        behind = places[:1, :, None] - places[:1, None, :]
        seen = causal_mask(t, 0, None)

        def layer(x, block):
            block, window = block
            q, k, v = block.project(block.attention_norm(x), angle)
            y = attend(q, k, v, seen & (behind < window))
            x = x + block.out(y).astype(x.dtype)
            return x + block.feed_forward(block.mlp_norm(x)).astype(x.dtype), None

        x, _ = jax.lax.scan(layer, x, (self.blocks, self._windows()))
        return self._logits(x)

    def empty_cache(self, slots: int, lanes: int = 1) -> AttentionCache:
        """A cache with room for so many tokens of each of some texts, which may lie in its slots in any order."""
        c = self.config
        shape = (c.layers, lanes, c.kv_heads, slots, c.head_dim)
        return AttentionCache(jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype))

    def extend(
        self,
        ids: Int[Array, "b m"],
        positions: Int[Array, "b m"],
        slots: Int[Array, "b m"],
        seen: Bool[Array, "b m s"],
        places: Int[Array, "b s"],
        wanted: Int[Array, " n"],
        cache: AttentionCache,
    ) -> tuple[Float[Array, "n v"], AttentionCache]:
        """Logits behind some tokens of each of b texts, which are put into the slots named (a slot past the end:
        nowhere), for those tokens that are `wanted` (places in the [b m] of them, row by row).

        `seen`: the slots each may look at, its own and its ancestors'; `places`: position of the token in each slot.
        """
        x, angle = self._enter(ids, positions)
        behind = positions[:, :, None] - places[:, None, :]

        def layer(carry, block):  # the whole cache goes along: as an input of each layer it would be copied
            x, cache = carry
            block, window, number = block
            q, k, v = block.project(block.attention_norm(x), angle)
            cache = _written(cache, number, k, v, slots)
            own = jax.tree.map(lambda c: jax.lax.dynamic_index_in_dim(c, number, keepdims=False), cache)
            x = x + block.out(attend_cached(q, own, seen & (behind < window))).astype(x.dtype)
            return (x + block.feed_forward(block.mlp_norm(x)).astype(x.dtype), cache), None

        each = self.blocks, self._windows(), jnp.arange(self.config.layers)
        (x, cache), _ = jax.lax.scan(layer, (x, cache), each)
        return self._logits(x.reshape(-1, x.shape[-1])[wanted]), cache


def _written(
    cache: AttentionCache,
    layer: Int[Array, ""],
    k: Float[Array, "b m g k"],
    v: Float[Array, "b m g k"],
    slots: Int[Array, "b m"],
) -> AttentionCache:
    """A cache with new keys and values of one layer in some slots; none where the slot is past the end."""
    lanes, heads = jnp.arange(k.shape[0])[:, None, None], jnp.arange(k.shape[2])[:, None]

    def put(old, new):
        new = jnp.swapaxes(new, 1, 2).astype(old.dtype)
        return old.at[layer, lanes, heads, slots[:, None]].set(new, mode="drop")

    return AttentionCache(put(cache.k, k), put(cache.v, v))


def token_structure(config: TokenLMConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The network without weights: its graph, and the shapes of its parameters."""
    model = jax.eval_shape(lambda: TokenLM(config, rngs=nnx.Rngs(params=jax.random.key(0))))
    graph, state = nnx.split(model, nnx.Param)
    return graph, nnx.to_pure_dict(state)
