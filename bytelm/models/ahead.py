"""Further heads: from each position, the bytes behind the next one (Gloeckle et al. 2024; EvaByte). They train with the
model, and draft what it then verifies (`drafts.py`, self-speculative decoding)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bytelm.config import AheadConfig
from bytelm.nn.layers import Linear, wide


class AheadHead(nnx.Module):
    """out(y + silu(mix y)), as Medusa's heads (Cai et al. 2024): the order of bytes needs a step of its own."""

    def __init__(self, d: int, symbols: int, *, std: float, dtype: str, rngs: nnx.Rngs):
        self.mix = Linear((d,), (d,), std=std, dtype=dtype, rngs=rngs)
        self.out = Linear((d,), (symbols,), std=std, dtype=dtype, rngs=rngs, widen=True)

    def __call__(self, y: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        return self.out(y + jax.nn.silu(self.mix(y)))


class Ahead(nnx.Module):
    """Heads 1 .. n, weights stacked [n, ...]: head k says what stands k places behind the next symbol."""

    def __init__(self, config: AheadConfig, d: int, symbols: int, *, std: float, dtype: str, rngs: nnx.Rngs):
        make = lambda key: AheadHead(d, symbols, std=std, dtype=dtype, rngs=nnx.Rngs(params=key))  # noqa: E731
        self.config = config
        self.heads = jax.vmap(make)(jax.random.split(rngs.params(), config.bytes))

    def __call__(self, y: Float[Array, "b d"]) -> Float[Array, "b n v"]:
        """Logits of every head at the last position of each row."""
        return jax.vmap(lambda head: head(y), out_axes=1)(self.heads)

    def loss(
        self, y: Float[Array, "b t d"], inputs: Int[Array, "b t"], segments: Int[Array, "b t"] | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The weighted mean loss of the heads, in nats, and of each the share of bytes that it has right. Targets are
        the inputs further on in the same document: its end is nobody's target.

        One head after the other, recomputed in the backward pass: logits of one are kept at a time."""
        b, t = inputs.shape
        segments = jnp.ones((b, t), jnp.int32) if segments is None else segments
        symbols = self.heads.out.kernel.shape[-1]

        @jax.checkpoint
        def one(total, head):
            head, k = head
            shift = lambda x: jnp.roll(x, -(k + 1), axis=1)  # noqa: E731
            valid = (segments > 0) & (shift(segments) == segments) & (jnp.arange(t) < t - 1 - k)
            logits = head(y).astype(wide(y.dtype))
            target = shift(inputs)
            picked = jnp.take_along_axis(logits, jnp.minimum(target, symbols - 1)[..., None], axis=-1)[..., 0]
            count = jnp.maximum(jnp.sum(valid), 1)
            nll = jnp.sum(jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) - picked, 0)) / count
            right = jnp.sum(valid & (jnp.argmax(logits, axis=-1) == target)) / count
            return total + nll, right

        n = self.config.bytes
        total, right = jax.lax.scan(one, jnp.zeros((), wide(y.dtype)), (self.heads, jnp.arange(1, n + 1)))
        return self.config.weight * total / n, {f"ahead{k + 1}/right": right[k] for k in range(n)}
