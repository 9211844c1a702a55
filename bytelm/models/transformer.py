"""The flat model: embedding, one stack of attention and Mamba-2 blocks, head.

Ids 0-255 are bytes; 256 stands in front of a document and ends it. Of a model over tokens they are the tokenizer's. The
table is padded to a multiple of 128 rows.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bytelm.config import FlatConfig
from bytelm.models.ahead import Ahead
from bytelm.models.base import Output
from bytelm.nn.cache import StackCache
from bytelm.nn.layers import Embedding, Linear
from bytelm.nn.stack import Stack
from bytelm.vocab import FLAT_IDS, NUM_SYMBOLS


def table_rows(symbols: int) -> int:
    """Rows of a table of so many symbols."""
    return -(-symbols // 128) * 128


TABLE_ROWS = table_rows(NUM_SYMBOLS)


class FlatModel(nnx.Module):
    """A flat decoder over bytes or tokens; logits have v = 257 entries, or one a token, in float32 or wider."""

    ids = FLAT_IDS

    def __init__(self, config: FlatConfig, *, rngs: nnx.Rngs):
        d, std = config.stack.d_model, config.init_std
        self.config = config
        rows = table_rows(config.symbols)
        self.embed = Embedding(rows, d, std=std, dtype=config.dtype, rngs=rngs)
        self.stack = Stack(config.stack, std=std, dtype=config.dtype, rngs=rngs)
        if not config.tie_embeddings:
            self.head = Linear((d,), (rows,), std=std, dtype=config.dtype, rngs=rngs, widen=True)
        if config.ahead.bytes:
            self.ahead = Ahead(config.ahead, d, rows, std=std, dtype=config.dtype, rngs=rngs)

    def _logits(self, y, symbols: int = 0):
        logits = self.embed.attend(y) if self.config.tie_embeddings else self.head(y)
        return logits[..., : symbols or self.config.symbols]

    def __call__(
        self,
        inputs: Int[Array, "b t"],
        segments: Int[Array, "b t"] | None = None,
        capacity: tuple[int, ...] | None = None,
    ) -> Output:
        """Logits of the next symbol after each input. Where `segments` changes, nothing flows across. A flat model has
        no chunks: `capacity` is not read.

        Rotary positions run on over the whole row: attention sees only differences of positions within a segment.
        """
        y = self.stack(self.embed(inputs), segments=segments)
        if not self.config.ahead.bytes:
            return Output(self._logits(y))
        loss, metrics = self.ahead.loss(y, inputs, segments)
        return Output(self._logits(y), loss, metrics)

    def prefill(
        self, inputs: Int[Array, "b t"], lengths: Int[Array, " b"], max_length: int
    ) -> tuple[Float[Array, "b v"], StackCache]:
        """Logits after each row's last input and the cache behind it; rows are right-padded, lengths at least 1."""
        y, cache = self.stack.prefill(self.embed(inputs), lengths, max_length)
        last = jnp.take_along_axis(y, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self._logits(last), cache

    def step(self, inputs: Int[Array, " b"], cache: StackCache) -> tuple[Float[Array, "b v"], StackCache]:
        """Logits after one more input per row."""
        y, cache = self.stack.step(self.embed(inputs), cache)
        return self._logits(y), cache

    def extend(self, inputs: Int[Array, "b q"], cache: StackCache) -> tuple[Array, Any, Float[Array, "b q d"]]:
        """After each of several more inputs per row: logits [b, q, v]; the trail that `keep` reads; what the logits are
        made of, for heads of further bytes."""
        y, trail = self.stack.extend(self.embed(inputs), cache)
        return self._logits(y), trail, y

    def keep(self, cache: StackCache, trail: Any, kept: Int[Array, " b"]) -> StackCache:
        """The cache after the first `kept` inputs of a trail."""
        return self.stack.keep(cache, trail, kept)
