"""ByT5 (Xue et al. 2022) and MrT5 (Kallini et al. 2025): an encoder-decoder of the T5 1.1 kind over bytes.

    source -> embed -> first blocks -> [delete gate, or a pooling] -> other blocks -> states -> decoder -> logits

What the encoder hands on has slots: without deletion one for each byte, after compaction one for each kept byte. Bytes
keep the positions they had. The encoder can be run in two parts (`look`, `finish`), so that a caller can see how many
bytes are kept and then choose the number of slots.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

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
from bytelm.nn.layers import Dropout, Embedding, Linear, wide
from bytelm.nn.relative import Attending, Keys
from bytelm.nn.t5_stack import T5Stack
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
    """What training tells a forward pass: the weight of the gate loss, the key of everything random."""

    alpha: Float[Array, ""]
    key: Array
    scores: Float[Array, ""] | float = 1.0  # factor of the score regulariser's weight


def score_excess(config: T5Config, encoder: Array, decoder: Array) -> Array:
    """Mean excess of the scores over the encoder's blocks behind the gate and all attentions to the encoder."""
    behind, crossed = config.encoder_layers - config.first_layers, config.decoder_layers
    return (encoder * behind + decoder * crossed) / (behind + crossed)


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
        body = lambda block, r, how: block.decode(r, bias, keys, encoded.states, encoded.keys(), how)  # noqa: E731
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
        training as the config says, else masked_hard). `capacity`: its slots in compact training (None: as the config
        says). `segments` is for other families.
        """
        d = self.config.deletion
        key = None if control is None else control.key
        mode = mode or ("masked_hard" if control is None else d.train)
        slots = None
        if mode == "compact" and control is not None:
            slots = capacity[0] if capacity else capacity_slots(d, source.shape[1])
        seen = self.look(source, source != PAD, key=key)
        encoded, more = self.finish(seen, mode, slots, key=key)
        logits, excess = self.decode(inputs, encoded, key=key)
        loss, metrics, need = jnp.zeros((), jnp.float32), {}, None
        if seen.gate is not None and seen.keep is not None:
            metrics = deletion_metrics(d, seen.gate, source, seen.keep, encoded.position.shape[1])
            need = jnp.quantile(seen.keep.sum(axis=1).astype(jnp.float32), 0.99)[None]
        if d.kind == "learned" and seen.gate is not None and control is not None:
            loss += control.alpha * mean_gate(seen.gate, source)
            metrics["deletion/alpha"] = control.alpha
            if d.score_weight:
                metrics["deletion/excess"] = score_excess(self.config, more["excess"], excess)
                loss += d.score_weight * control.scores * metrics["deletion/excess"]
        if "boundary_loss" in more:
            loss += more["boundary_loss"]
            real = jnp.maximum(jnp.sum(source != PAD), 1)
            metrics |= {"deletion/boundary_loss": more["boundary_loss"],
                        "deletion/rate": 1 - more["boundaries"].sum() / real}  # fmt: skip
        return Output(logits, loss, metrics, need=need)

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
            r, _ = block.cross(r + y.astype(r.dtype), sk, sv, encoded.keys(), how)
            room = lambda z: jnp.pad(z, ((0, 0), (0, max_length - t), (0, 0), (0, 0)))  # noqa: E731
            return block.feed_forward(r, Dropout()), (room(k), room(v), sk, sv)

        r, (k, v, source_k, source_v) = jax.lax.scan(layer, r, self.decoder.blocks)
        y = jnp.take_along_axis(self.decoder.norm(r), (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self._logits(y), DecoderCache(lengths, k, v, source_k, source_v, encoded.keys())

    def step(self, inputs: Int[Array, " b"], cache: DecoderCache) -> tuple[Float[Array, "b v"], DecoderCache]:
        """Logits after one more input per row. The caller keeps lengths below the cache's room."""
        y, (k, v), _ = self._read(inputs[:, None], cache)
        return self._logits(y[:, 0]), dataclasses.replace(cache, lengths=cache.lengths + 1, k=k, v=v)

    def extend(self, inputs: Int[Array, "b q"], cache: DecoderCache) -> tuple[Array, Any, Float[Array, "b q d"]]:
        """After each of several more inputs per row: logits [b, q, v]; the trail that `keep` reads; what the logits are
        made of. The caller keeps lengths + q within the cache's room."""
        y, _, trail = self._read(inputs, cache)
        return self._logits(y), trail, y

    def _read(self, inputs: Int[Array, "b q"], cache: DecoderCache):
        """Vectors behind more inputs [b, q, d], keys and values of the cache with them, and theirs alone [l, b, q, h,
        k]."""
        rows, slots = jnp.arange(inputs.shape[0])[:, None], jnp.arange(cache.k.shape[2])[None]
        places = cache.lengths[:, None] + jnp.arange(inputs.shape[1])
        bias = self.decoder.position_bias(places, slots)
        keys = Keys(slots[:, None] <= places[:, :, None])
        how = Attending(self.config.softmax_one)

        def layer(r, block):
            block, k, v, sk, sv = block
            x = block.attention_norm(r)
            new_k, new_v = block.attention.project_keys(x)
            k, v = (old.at[rows, places].set(new, mode="drop") for old, new in ((k, new_k), (v, new_v)))
            y, _ = block.attention(x, k, v, bias, keys, how)
            r, _ = block.cross(r + y.astype(r.dtype), sk, sv, cache.source, how)
            return block.feed_forward(r, Dropout()), ((k, v), (new_k, new_v))

        r = self.embed(inputs).astype(wide(self.config.dtype))
        per_layer = (self.decoder.blocks, cache.k, cache.v, cache.source_k, cache.source_v)
        r, (whole, new) = jax.lax.scan(layer, r, per_layer)
        return self.decoder.norm(r), whole, new

    def keep(self, cache: DecoderCache, trail: Any, kept: Int[Array, " b"]) -> DecoderCache:
        """The cache after the first `kept` inputs of a trail."""
        index, room = jnp.arange(trail[0].shape[2]), cache.k.shape[2]
        place = jnp.where(index < kept[:, None], cache.lengths[:, None] + index, room)
        rows = jnp.arange(len(kept))[:, None]
        k, v = (old.at[:, rows, place].set(new, mode="drop") for old, new in zip((cache.k, cache.v), trail))
        return dataclasses.replace(cache, lengths=cache.lengths + kept, k=k, v=v)
