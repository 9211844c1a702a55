"""BLT, the byte latent transformer (Pagnoni et al. 2024, arXiv 2412.09871).

Bytes, with embeddings of hashes of the last few of them, go through a local encoder. Several queries per patch, made of
the largest of each feature over the patch's bytes, attend to those bytes; a global stack runs over the patches. In
front of each block of the local decoder a byte reads the newest whole patch: at a patch's last byte that is its own.

Where patches begin is known one byte ahead (`models/patcher.py`): in training from marks that were made before, else
from the entropy model that is part of the network.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bytelm.config import BLTConfig, StackConfig, parse_layout
from bytelm.models.base import Output
from bytelm.models.chunking import segment_starts
from bytelm.models.patcher import Patcher, PatchState, begins_of, flat_ids
from bytelm.models.units import Units, make_units, unit_output
from bytelm.nn.cache import StackCache
from bytelm.nn.compaction import expand
from bytelm.nn.hashing import PRIMES, ngram_hashes
from bytelm.nn.layers import Embedding, Linear, RMSNorm, wide
from bytelm.nn.segment import segment_max, segment_softmax
from bytelm.nn.stack import Stack
from bytelm.parallel.mesh import shard
from bytelm.vocab import BLT_IDS

VOCABULARY = 260


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


@jax.tree_util.register_dataclass
@dataclass
class BLTCache:
    """What decoding keeps: the caches of the stacks, the patch so far, and what bytes read of the newest whole one."""

    encoder: StackCache
    main: StackCache
    decoder: StackCache
    recent: Int[Array, "b n"]  # the last ids, newest last, 0 before the start
    patch: PatchState
    begin: Int[Array, " b"]  # position of the first byte of the patch so far
    top: Float[Array, "b d"]  # its largest features
    keys: Float[Array, "b s g k"]  # of bytes, by position
    values: Float[Array, "b s g k"]
    read: tuple[Array, Array] = field(default_factory=tuple)  # keys and values for each decoder layer: l b q h k


class BLT(nnx.Module):
    """Embeddings, encoder, patch pooling, global stack, decoder that reads patches, head; and the patcher."""

    ids = BLT_IDS

    def __init__(self, config: BLTConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        more = dict(std=c.init_std, dtype=c.dtype, rngs=rngs)
        d, wider = c.encoder.d_model, c.main.d_model
        self.embed = Embedding(VOCABULARY, d, **more)
        if c.ngrams:
            self.hash_embed = Embedding(len(c.ngrams) * c.hash_functions * c.hash_size, d, split=True, **more)
        self.encoder = Stack(c.encoder, closing_norm=False, **more)
        self.pool = PatchPooling(c, rngs=rngs)
        if c.queries * d != wider:
            self.join = Linear((c.queries, d), (wider,), **more)
        self.main = Stack(c.main, closing_norm=False, **more)
        self.part = Linear((wider,), (c.queries, d), **more)
        keys = jax.random.split(rngs.params(), self._reading_layers)
        make = lambda key: CrossAttention(  # noqa: E731
            c.decoder, std=c.init_std, doubled=c.doubled, dtype=c.dtype, rngs=nnx.Rngs(params=key)
        )
        self.read = jax.vmap(make)(keys)
        self.decoder = Stack(c.decoder, **more)
        self.head = Linear((d,), (VOCABULARY,), **more, widen=True)
        self.patcher = Patcher(c.patcher, rngs=rngs)

    @property
    def _reading_layers(self) -> int:
        """Decoder layers that read patches."""
        return sum(n for _, n in parse_layout(self.config.decoder.layout)) if self.config.read_every_layer else 1

    @property
    def _longest_group(self) -> int:
        return max(self.config.ngrams, default=1)

    def _enter(self, inputs: Int[Array, "*b"], recent: Int[Array, "*b n"]) -> Float[Array, "*b d"]:
        """Embeddings of bytes and of the groups that end with them; `recent`: the last ids, this one the last."""
        c, x = self.config, self.embed(inputs)
        if not c.ngrams:
            return x
        kinds = ((function, n) for function in range(c.hash_functions) for n in c.ngrams)
        for i, (function, n) in enumerate(kinds):
            x += self.hash_embed(ngram_hashes(recent[..., -n:], PRIMES[function], c.hash_size) + i * c.hash_size)
        return x

    def _recent(self, inputs: Int[Array, "b t"], place: Int[Array, "b t"]) -> Int[Array, "b t n"]:
        """The last ids at each position, 0 before the document."""
        n = self._longest_group
        shifted = [jnp.pad(inputs, ((0, 0), (back, 0)))[:, : inputs.shape[1]] for back in range(n - 1, -1, -1)]
        back = jnp.arange(n - 1, -1, -1)
        return jnp.where(back <= place[..., None], jnp.stack(shifted, axis=-1), 0)

    def _widen(self, patches: Float[Array, "*b q d"]) -> Float[Array, "*b e"]:
        return self.join(patches) if hasattr(self, "join") else patches.reshape(*patches.shape[:-2], -1)

    def _decode(self, run, h, guide: Any):
        """The decoder's output: `run` is its forward pass, prefill or step."""
        if self.config.read_every_layer:
            return run(h, guide=guide)
        r = h.astype(wide(h.dtype))
        return run(guide.enter(r, jax.tree.map(lambda x: x[0], guide.at_layers(0, 1))))

    def _slots(self, units: Units, fires) -> Int[Array, "b t"]:
        """Slot of the newest whole patch at each position."""
        return jnp.clip(units.number - 1 + fires, 0, units.slots - 1)

    def __call__(
        self,
        inputs: Int[Array, "b t"],
        segments: Int[Array, "b t"] | None = None,
        capacity: tuple[int, ...] | None = None,
        marks: Int[Array, "b t"] | None = None,
    ) -> Output:
        """Logits of the next id after each input, and the level of patches.

        `marks` is above 0 at positions behind which a patch begins; without, the patcher says so. Targets of positions
        that `Output.scored` leaves out belong to patches without a slot.
        """
        starts = segment_starts(segments, *inputs.shape)
        fires = self.patcher.fires(flat_ids(inputs, self.ids), segments) if marks is None else (marks > 0) | starts
        units = make_units(begins_of(fires, starts), segments, None if capacity is None else capacity[0])
        h = self.encoder(self._enter(inputs, self._recent(inputs, units.place)), segments=segments)
        patches = shard(self._widen(self.pool(h, units)), "batch", None, None)
        o = self.main(patches, segments=units.document)
        guide = PatchGuide(self.read, self.part(o), self._slots(units, fires))

        def run(x, guide=None):
            return self.decoder(x, segments=segments, guide=guide)

        logits = self.head(self._decode(run, h, guide))
        return unit_output(logits, units, inputs - self.ids.offset, segments, limited=capacity is not None)

    def prefill(
        self, inputs: Int[Array, "b t"], lengths: Int[Array, " b"], max_length: int
    ) -> tuple[Float[Array, "b v"], BLTCache]:
        """Logits after each row's last input and the cache behind it; rows are right-padded, lengths at least 1."""
        b, t = inputs.shape
        patch, fires = self.patcher.behind(flat_ids(inputs, self.ids), lengths, max_length)
        units = make_units(begins_of(fires, segment_starts(None, b, t)), None, None)
        rows, last = jnp.arange(b), lengths - 1
        recent = self._recent(inputs, units.place)
        h, encoder = self.encoder.prefill(self._enter(inputs, recent), lengths, max_length)
        whole = self._slots(units, fires)[rows, last]  # the newest whole patch
        o, main = self.main.prefill(self._widen(self.pool(h, units)), whole + 1, max_length)
        parts = self.part(o)
        guide = PatchGuide(self.read, parts, self._slots(units, fires))

        def run(x, guide=None):
            return self.decoder.prefill(x, lengths, max_length, guide)

        y, decoder = self._decode(run, h, guide)
        number = units.number[rows, last]
        mine = (units.number == number[:, None]) & (jnp.arange(t) < lengths[:, None])
        top = jnp.where(mine[..., None], h, -jnp.inf).max(axis=1)
        room = ((0, 0), (0, max(max_length - t, 0)), (0, 0), (0, 0))
        keys, values = (jnp.pad(x, room) for x in self.pool.cross.shared_keys(h))
        cache = BLTCache(
            encoder, main, decoder, recent[rows, last], patch,
            units.first[rows, number], top, keys, values, self._layer_keys(parts[rows, whole]),
        )  # fmt: skip
        return self.head(y[rows, last]), cache

    def _layer_keys(self, patch: Float[Array, "b q d"]) -> tuple[Array, Array]:
        """Keys and values of one patch a row for each decoder layer that reads it."""
        return jax.vmap(lambda cross: cross.keys(patch))(self.read)

    def step(self, inputs: Int[Array, " b"], cache: BLTCache) -> tuple[Float[Array, "b v"], BLTCache]:
        """Logits after one more input per row. The global stack runs for rows in which a patch ends with it."""
        position = cache.encoder.lengths
        recent = jnp.concatenate([cache.recent[:, 1:], inputs[:, None]], axis=1)
        h, encoder = self.encoder.step(self._enter(inputs, recent), cache.encoder)
        begins = cache.patch.next
        top = jnp.where(begins[:, None], h, jnp.maximum(cache.top, h))
        begin = jnp.where(begins, position, cache.begin)
        rows = jnp.arange(len(inputs))
        keys, values = (
            old.at[rows, position].set(new, mode="drop")
            for old, new in zip((cache.keys, cache.values), self.pool.cross.shared_keys(h))
        )
        patch = self.patcher.read(flat_ids(inputs, self.ids), cache.patch)

        def run(carry):
            main, read = carry
            index = jnp.arange(keys.shape[1])
            mine = (index >= begin[:, None]) & (index <= position[:, None])
            o, main = self.main.step(self._widen(self.pool.one(top, keys, values, mine)), main, patch.next)
            new = self._layer_keys(self.part(o))
            keep = patch.next[None, :, None, None, None]
            return main, jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, read)

        main, read = jax.lax.cond(jnp.any(patch.next), run, lambda carry: carry, (cache.main, cache.read))
        guide = PatchStep(self.read, *read)
        y, decoder = self._decode(lambda x, guide=None: self.decoder.step(x, cache.decoder, guide=guide), h, guide)
        return self.head(y), BLTCache(encoder, main, decoder, recent, patch, begin, top, keys, values, read)

    def empty_cache(self, b: int, max_length: int) -> BLTCache:
        """The cache of rows that have seen nothing yet."""
        c, d = self.config, self.config.encoder.d_model
        encoder, main, decoder = (stack.empty_cache(b, max_length) for stack in (self.encoder, self.main, self.decoder))
        held = jnp.zeros((b, max_length, c.encoder.kv_heads, c.encoder.head_width), c.dtype)
        read = jnp.zeros((self._reading_layers, b, c.queries, c.decoder.num_heads, c.decoder.head_width), c.dtype)
        return BLTCache(
            encoder, main, decoder, jnp.zeros((b, self._longest_group), jnp.int32),
            self.patcher.no_bytes(b, max_length), jnp.zeros(b, jnp.int32), jnp.zeros((b, d), c.dtype), held, held,
            (read, read),
        )  # fmt: skip
