"""ByT5 (Xue et al. 2022) and MrT5 (Kallini et al. 2025): an encoder-decoder of the T5 1.1 kind over bytes.

    source -> embed -> first blocks -> [delete gate, or a pooling] -> other blocks -> states -> decoder -> logits

What the encoder hands on has slots: without deletion one for each byte, after compaction one for each kept byte. Bytes
keep the positions they had. The encoder can be run in two parts (`look`, `finish`), so that a caller can see how many
bytes are kept and then choose the number of slots.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bytelm.config import ConfigError, T5Config
from bytelm.models.base import Output
from bytelm.models.deletion import (
    PAD,
    DeleteGate,
    capacity_slots,
    deletion_metrics,
    fixed_gate,
    keep_highest,
    keeps,
    mean_gate,
    random_gate,
)
from bytelm.models.pooling import (
    BoundaryPredictor,
    StridedConvolution,
    binomial_nll,
    close_rows,
    draw_boundaries,
    pool_segments,
)
from bytelm.nn.compaction import compact, slot_positions
from bytelm.nn.layers import Dropout, Embedding, GatedGELU, Linear, RMSNorm, wide
from bytelm.nn.relative import Attending, Keys, PositionBias, RelativeAttention
from bytelm.nn.stack import REMAT_POLICIES
from bytelm.parallel.mesh import shard
from bytelm.vocab import T5_IDS

Mode = Literal["none", "soft", "masked_hard", "compact"]


@jax.tree_util.register_dataclass
@dataclass
class Seen:
    """A source behind the encoder's first blocks."""

    source: Int[Array, "b t"]
    states: Float[Array, "b t d"]
    visible: Bool[Array, "b t"] | None  # bytes that may be attended to; None: all, padding too
    gate: Float[Array, "b t"] | None  # gate values
    gate_logits: Float[Array, "b t"] | None
    keep: Bool[Array, "b t"] | None  # what hard deletion keeps


@jax.tree_util.register_dataclass
@dataclass
class Encoded:
    """What the decoder reads: states in slots, which of them it may attend to, and what is added to their scores."""

    states: Float[Array, "b c d"]
    visible: Bool[Array, "b c"] | None
    gate: Float[Array, "b c"] | None
    position: Int[Array, "b c"]  # byte of the source that each slot stands for; t in an empty one

    def keys(self) -> Keys:
        return Keys(None if self.visible is None else self.visible[:, None], self.gate)


@jax.tree_util.register_dataclass
@dataclass
class DecoderCache:
    """Keys and values of the ids so far and of the encoder's slots, with a leading layers axis."""

    lengths: Int[Array, " b"]
    k: Float[Array, "l b s h k"]
    v: Float[Array, "l b s h k"]
    source_k: Float[Array, "l b c h k"]
    source_v: Float[Array, "l b c h k"]
    source: Keys


@jax.tree_util.register_dataclass
@dataclass
class Control:
    """What training tells a forward pass: the weight of the gate loss, and the key of everything random."""

    alpha: Float[Array, ""]
    key: Array


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

    def _cross(self, r, k, v, keys: Keys, how: Attending):
        y, excess = self.cross_attention(self.cross_norm(r), k, v, None, keys, how)
        return r + how.dropout(y, 1).astype(r.dtype), excess

    def _feed_forward(self, r, dropout: Dropout):
        return shard(r + dropout(self.mlp(self.mlp_norm(r), dropout), 1).astype(r.dtype), "batch", None, None)

    def encode(self, r, bias, keys: Keys, how: Attending):
        """(residual, excess of the scores)."""
        r, excess = self._attend(r, bias, keys, _part(how, 0))
        return self._feed_forward(r, how.dropout.fold(1)), excess

    def decode(self, r, bias, keys: Keys, encoded: Encoded, how: Attending):
        """(residual, excess of the scores of the attention to the encoder)."""
        r, _ = self._attend(r, bias, keys, dataclasses.replace(_part(how, 0), measure=False))
        k, v = self.cross_attention.project_keys(encoded.states)
        r, excess = self._cross(r, k, v, encoded.keys(), _part(how, 2))
        return self._feed_forward(r, how.dropout.fold(1)), excess


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
            r, excess = jax.lax.scan(looked_up, r, numbers, unroll=1 if c.scan_layers else True)
            return r, excess.mean()

        def layer(r, block):
            block, number = block
            return body(block, r, _part(how, number))

        looped = c.scan_layers and end - first > 1
        if c.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[c.remat], prevent_cse=not looped)
        some = jax.tree.map(lambda p: p[first:end], self.blocks)
        r, excess = jax.lax.scan(layer, r, (some, numbers), unroll=1 if c.scan_layers else True)
        return r, excess.mean()


class Encoder(T5Stack):
    """Blocks in front of and behind what shortens the sequence, and that itself."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        super().__init__(config, decoder=False, rngs=rngs)
        d, options = config.d_model, dict(eps=config.norm_eps, rngs=rngs)
        if config.deletion.kind == "learned":
            self.delete_gate = DeleteGate(d, config.deletion, **options)
        elif config.deletion.kind == "boundary":
            self.boundary = BoundaryPredictor(d, config.d_mlp, **options)
        elif config.deletion.kind == "convolution":
            self.pool = StridedConvolution(d, config.deletion.stride, dtype=config.dtype, **options)

    def between(self, r, position, first: int, end: int, keys: Keys, how: Attending, *, training: bool):
        """Blocks first .. end - 1 over states at the positions given."""
        bias = self.position_bias(position, position)
        body = lambda block, r, how: block.encode(r, bias, keys, how)  # noqa: E731
        return self.run(r, first, end, how, body, training=training)


class T5(nnx.Module):
    """Embedding, encoder, decoder, head. Ids: 0 padding and start of the target, 1 end, byte + 3."""

    ids = T5_IDS

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config.vocabulary, config.d_model, std=0, dtype=config.dtype, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = T5Stack(config, decoder=True, rngs=rngs)
        if not config.tie_embeddings:
            self.head = Linear(
                (config.d_model,), (config.vocabulary,), std=0, dtype=config.dtype, rngs=rngs, widen=True
            )

    # The encoder.

    def look(
        self,
        source: Int[Array, "b t"],
        visible: Bool[Array, "b t"] | None = None,
        *,
        threshold: float | Array | None = None,
        key: Array | None = None,
    ) -> Seen:
        """The first blocks and the gate. `visible` hides padding in them, if it is given; `key` is for training, and
        for the random gate, which without one always draws the same."""
        c = self.config
        how = self._attending(key, 0)
        r = how.dropout(self.embed(source), 5).astype(wide(c.dtype))
        position = jnp.arange(source.shape[1])[None]
        keys = Keys(None if visible is None else visible[:, None])
        r, _ = self.encoder.between(r, position, 0, c.first_layers, keys, how, training=key is not None)
        gate = logits = keep = None
        own = None if key is None else jax.random.fold_in(key, 1)
        if c.deletion.kind == "learned":
            gate, logits = self.encoder.delete_gate(r, source, own)
        elif c.deletion.kind == "random":
            gate = random_gate(source, c.deletion.rate, c.deletion.scale, jax.random.key(0) if own is None else own)
        elif c.deletion.kind == "fixed":
            gate = fixed_gate(source, c.deletion.rate, c.deletion.scale)
        if gate is not None:
            keep = keeps(gate, c.deletion.threshold if threshold is None else threshold, visible)
        return Seen(source, r, visible, gate, logits, keep)

    def finish(
        self,
        seen: Seen,
        mode: Mode = "soft",
        slots: int | None = None,
        *,
        key: Array | None = None,
        boundaries: Float[Array, "b t"] | None = None,
    ) -> tuple[Encoded, dict[str, Array]]:
        """The other blocks, and what they have to say: `excess` of the scores, `boundary_loss`, `boundaries`.

        `mode` is how a gate deletes: "soft" adds its values to the scores, "masked_hard" hides the bytes that are not
        kept, "compact" takes them out, into `slots` slots per row (None: as many as there are bytes); "none" ignores
        it. The pooling baselines have one way only. `boundaries` replaces the drawn ones.
        """
        c = self.config
        b, t = seen.source.shape
        own = None if key is None else jax.random.fold_in(key, 2)
        how = self._attending(own, 1)
        more: dict[str, Array] = {}
        everywhere = jnp.broadcast_to(jnp.arange(t), (b, t))
        if c.deletion.kind in ("boundary", "convolution"):
            return self._pooled(seen, own, how, boundaries)
        r, visible, gate, position = seen.states, seen.visible, None, everywhere
        if seen.gate is not None and seen.keep is not None and mode != "none":
            soft = seen.gate.astype(r.dtype)
            if mode == "soft":
                gate = soft
            elif mode == "masked_hard":
                visible = seen.keep
            elif mode == "compact":
                keep, slots = seen.keep, t if slots is None else slots
                if c.deletion.overflow == "gate" and slots < t:
                    keep = keep_highest(keep, seen.gate, slots)
                position = slot_positions(keep, slots)
                r, visible = compact(r, position), position < t
                soft = compact(soft, position)
            else:
                raise ConfigError(f"deletion mode {mode!r}: choose none, soft, masked_hard or compact")
            if mode != "soft" and key is not None and c.deletion.straight_through:
                gate = soft - jax.lax.stop_gradient(soft)
        encoded = Encoded(r, visible, gate, position)
        shared = jnp.arange(t)[None] if position is everywhere else position
        r, more["excess"] = self.encoder.between(
            r, shared, c.first_layers, c.encoder_layers, encoded.keys(), how, training=key is not None
        )
        encoded.states = how.dropout(self.encoder.norm(r), 6)
        return encoded, more

    def _pooled(self, seen: Seen, key, how: Attending, given) -> tuple[Encoded, dict[str, Array]]:
        c, more = self.config, {}
        b, t = seen.source.shape
        real = seen.source != PAD if seen.visible is None else seen.visible
        if c.deletion.kind == "convolution":
            pooled = self.encoder.pool(seen.states, real)
            inside = None if seen.visible is None else pooled.valid
        else:
            logits = self.encoder.boundary(seen.states)
            drawn = draw_boundaries(logits, key) if given is None else given
            drawn = close_rows(drawn, real)
            length = jnp.full(b, t) if c.deletion.released else real.sum(axis=1)
            more["boundary_loss"] = binomial_nll(drawn.sum(axis=1), length.astype(logits.dtype), 1 - c.deletion.rate)
            more |= {"boundaries": drawn > 0.5, "boundary_logits": logits}
            pooled = pool_segments(seen.states, drawn, t, rest=c.deletion.released)
            inside = pooled.valid
            if c.deletion.released:  # as many slots as the longest row needs, all of them seen
                inside = jnp.arange(t) < pooled.valid.sum(axis=1).max()
                inside = jnp.broadcast_to(inside, (b, t))
        keys = Keys(None if inside is None else inside[:, None])
        r, more["excess"] = self.encoder.between(
            pooled.states, pooled.position, c.first_layers, c.encoder_layers, keys, how, training=key is not None
        )
        states = how.dropout(self.encoder.norm(r), 6)
        position = jnp.where(pooled.valid, pooled.position, t)
        return Encoded(states, pooled.valid, None, position), more

    def encode(
        self,
        source: Int[Array, "b t"],
        visible: Bool[Array, "b t"] | None = None,
        mode: Mode = "soft",
        slots: int | None = None,
        *,
        threshold: float | Array | None = None,
    ) -> tuple[Seen, Encoded]:
        """The whole encoder; see `look` and `finish`."""
        seen = self.look(source, visible, threshold=threshold)
        return seen, self.finish(seen, mode, slots)[0]

    # The decoder.

    def _attending(self, key: Array | None, side: int) -> Attending:
        c = self.config
        dropout = Dropout(c.dropout, key).fold(side) if key is not None else Dropout()
        return Attending(c.softmax_one, key is not None and c.deletion.score_weight > 0, dropout)

    def _logits(self, y):
        if self.config.scale_logits:
            y = y * self.config.d_model**-0.5
        return self.embed.attend(y) if self.config.tie_embeddings else self.head(y)

    def decode(
        self, inputs: Int[Array, "b t"], encoded: Encoded, *, key: Array | None = None
    ) -> tuple[Float[Array, "b t v"], Float[Array, ""]]:
        """(logits of the id after each input, excess of the scores of the attention to the encoder)."""
        t = inputs.shape[1]
        how = self._attending(key, 2)
        r = how.dropout(self.embed(inputs), 5).astype(wide(self.config.dtype))
        position = jnp.arange(t)[None]
        bias = self.decoder.position_bias(position, position)
        keys = Keys(position[:, None, :] <= position[:, :, None])
        body = lambda block, r, how: block.decode(r, bias, keys, encoded, how)  # noqa: E731
        r, excess = self.decoder.run(r, 0, self.config.decoder_layers, how, body, training=key is not None)
        return self._logits(how.dropout(self.decoder.norm(r), 6)), excess

    def __call__(
        self,
        inputs: Int[Array, "b t"],
        segments: Int[Array, "b t"] | None = None,
        capacity: tuple[int, ...] | None = None,
        *,
        source: Int[Array, "b s"],
        control: Control | None = None,
        mode: Mode | None = None,
    ) -> Output:
        """Logits of the next target id after each of `inputs`, and the losses of what shortens the encoder.

        Padding of the source is hidden. `control` makes it a training pass. `mode` is how a gate deletes (None: in
        training as the config says, else masked_hard). `segments` and `capacity` are for other families.
        """
        d = self.config.deletion
        key = None if control is None else control.key
        mode = mode or ("masked_hard" if control is None else d.train)
        slots = capacity_slots(d, source.shape[1]) if mode == "compact" and control is not None else None
        seen = self.look(source, source != PAD, key=key)
        encoded, more = self.finish(seen, mode, slots, key=key)
        logits, excess = self.decode(inputs, encoded, key=key)
        loss, metrics = jnp.zeros((), jnp.float32), {}
        if seen.gate is not None and seen.keep is not None:
            metrics = deletion_metrics(d, seen.gate, source, seen.keep, encoded.position.shape[1])
        if d.kind == "learned" and seen.gate is not None and control is not None:
            loss += control.alpha * mean_gate(seen.gate, source)
            metrics["deletion/alpha"] = control.alpha
            if d.score_weight:
                behind = self.config.encoder_layers - d.layer
                crossed = self.config.decoder_layers
                metrics["deletion/excess"] = (more["excess"] * behind + excess * crossed) / (behind + crossed)
                loss += d.score_weight * metrics["deletion/excess"]
        if "boundary_loss" in more:
            loss += more["boundary_loss"]
            real = jnp.maximum(jnp.sum(source != PAD), 1)
            metrics |= {"deletion/boundary_loss": more["boundary_loss"],
                        "deletion/rate": 1 - more["boundaries"].sum() / real}  # fmt: skip
        return Output(logits, loss, metrics)

    # Decoding, one id at a time.

    def prefill(
        self, inputs: Int[Array, "b t"], lengths: Int[Array, " b"], max_length: int, encoded: Encoded
    ) -> tuple[Float[Array, "b v"], DecoderCache]:
        """Logits after each row's last input and the cache behind it; rows are right-padded, lengths at least 1."""
        c = self.config
        t = inputs.shape[1]
        r = self.embed(inputs).astype(wide(c.dtype))
        position = jnp.arange(t)[None]
        bias = self.decoder.position_bias(position, position)
        keys = Keys(position[:, None, :] <= position[:, :, None])
        how = Attending(c.softmax_one)

        def layer(r, block):
            x = block.attention_norm(r)
            k, v = block.attention.project_keys(x)
            y, _ = block.attention(x, k, v, bias, keys, how)
            sk, sv = block.cross_attention.project_keys(encoded.states)
            r, _ = block._cross(r + y.astype(r.dtype), sk, sv, encoded.keys(), how)
            room = lambda z: jnp.pad(z, ((0, 0), (0, max_length - t), (0, 0), (0, 0)))  # noqa: E731
            return block._feed_forward(r, Dropout()), (room(k), room(v), sk, sv)

        r, (k, v, source_k, source_v) = jax.lax.scan(layer, r, self.decoder.blocks)
        y = jnp.take_along_axis(self.decoder.norm(r), (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self._logits(y), DecoderCache(lengths, k, v, source_k, source_v, encoded.keys())

    def step(self, inputs: Int[Array, " b"], cache: DecoderCache) -> tuple[Float[Array, "b v"], DecoderCache]:
        """Logits after one more input per row. The caller keeps lengths below the cache's room."""
        c = self.config
        rows, slots = jnp.arange(inputs.shape[0]), jnp.arange(cache.k.shape[2])[None]
        r = self.embed(inputs)[:, None].astype(wide(c.dtype))
        bias = self.decoder.position_bias(cache.lengths[:, None], slots)
        keys = Keys((slots <= cache.lengths[:, None])[:, None])
        how = Attending(c.softmax_one)

        def layer(r, block):
            block, k, v, sk, sv = block
            x = block.attention_norm(r)
            new_k, new_v = block.attention.project_keys(x)
            k = k.at[rows, cache.lengths].set(new_k[:, 0], mode="drop")
            v = v.at[rows, cache.lengths].set(new_v[:, 0], mode="drop")
            y, _ = block.attention(x, k, v, bias, keys, how)
            r, _ = block._cross(r + y.astype(r.dtype), sk, sv, cache.source, how)
            return block._feed_forward(r, Dropout()), (k, v)

        per_layer = (self.decoder.blocks, cache.k, cache.v, cache.source_k, cache.source_v)
        r, (k, v) = jax.lax.scan(layer, r, per_layer)
        logits = self._logits(self.decoder.norm(r)[:, 0])
        return logits, dataclasses.replace(cache, lengths=cache.lengths + 1, k=k, v=v)
