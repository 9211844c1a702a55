"""H-Net (Hwang, Wang & Gu 2025): a byte model that learns where to cut, at any number of levels.

    x -> encoder -> router -> chunks -> inner network -> smoothed, put back, + residual -> decoder

The inner network is a stage of the same kind or, innermost, one stack. Each stage s has the width d_model[s]: vectors
that come in narrower are filled up with a learned vector and cut back on the way out. Chunks lie in a fixed number of
slots per row (`nn/compaction.py`): without a `capacity`, as many as there are positions, which is exact.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bytelm.config import HNetConfig
from bytelm.models.ahead import Ahead
from bytelm.models.base import Output
from bytelm.models.chunk_metrics import level_metrics
from bytelm.models.chunking import Routing, boundary_means, ratio_loss, segment_starts
from bytelm.models.hnet_stage import Pending, Row, Stage, StageCache, make_stage
from bytelm.models.patcher import Patcher, PatchState, PatchTrail, begins_of, flat_ids
from bytelm.models.told import no_bytes, told_behind, told_boundaries, told_extend, told_step
from bytelm.nn.cache import newest, pick
from bytelm.nn.layers import Embedding, Linear
from bytelm.vocab import HNET_IDS

VOCABULARY = 256


class HNet(nnx.Module):
    """Embedding, stages, head. Ids are bytes; 254 stands in front of a document, 255 ends it."""

    ids = HNET_IDS

    def __init__(self, config: HNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.told = config.chunker != "learned"
        d = config.d_model[0]
        self.embed = Embedding(VOCABULARY, d, std=config.embed_std, dtype=config.dtype, rngs=rngs)
        self.backbone = make_stage(config, 0, d, 0, rngs)
        if not config.tie_embeddings:
            self.head = Linear((d,), (VOCABULARY,), std=config.init_std, dtype=config.dtype, rngs=rngs, widen=True)
        if config.ahead.bytes:
            self.ahead = Ahead(config.ahead, d, VOCABULARY, std=config.init_std, dtype=config.dtype, rngs=rngs)
        if config.chunker == "entropy":
            self.patcher = Patcher(config.patcher, rngs=rngs)

    def _logits(self, y):
        return self.embed.attend(y) if self.config.tie_embeddings else self.head(y)

    def _told(self, inputs, segments, marks=None) -> Bool[Array, "b t"] | None:
        """Boundaries of the rule that stands in the outermost router's place, if one does."""
        if not self.told:
            return None
        if self.config.chunker == "entropy":
            fires = self.patcher.fires(flat_ids(inputs, self.ids), segments) if marks is None else marks > 0
            starts = segment_starts(segments, *inputs.shape)
            return begins_of(fires | starts, starts)
        return told_boundaries(self.config.chunker, self.config.targets[0], inputs, segments)

    def __call__(
        self,
        inputs: Int[Array, "b t"],
        segments: Int[Array, "b t"] | None = None,
        capacity: tuple[int, ...] | None = None,
        marks: Int[Array, "b t"] | None = None,
    ) -> Output:
        """Logits of the next id after each input, the weighted ratio losses, and what each level decided.

        Where `segments` changes nothing flows across; 0 is padding. `capacity` is the number of chunk slots at each
        level, outermost first. `marks`, for chunks by entropy, is above 0 at positions behind which one begins;
        without, the patcher says so.
        """
        b, t = inputs.shape
        position = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
        valid = jnp.ones((b, t), bool) if segments is None else segments > 0
        row = Row(position, valid, segments, self._told(inputs, segments, marks))
        y, levels = self.backbone(self.embed(inputs), row, capacity)
        loss, metrics = jnp.zeros((), jnp.float32), {}
        for i, (level, target) in enumerate(zip(levels, self.config.targets)):
            fraction, probability = boundary_means(Routing(level.probability, level.boundary), level.valid)
            told = i == 0 and row.told is not None
            ratio = jnp.zeros(()) if told else ratio_loss(fraction, probability, target)
            loss += ratio
            slots = None if capacity is None else capacity[i]
            found = level_metrics(level, inputs, row.valid, slots)
            found |= {"fraction": fraction, "mean_probability": probability, "ratio_loss": ratio}
            metrics |= {f"level{i}/{name}": value for name, value in found.items()}
        loss = self.config.ratio_weight * loss
        if self.config.ahead.bytes:
            more, right = self.ahead.loss(y, inputs, segments)
            loss, metrics = loss + more, metrics | right
        return Output(self._logits(y), loss, metrics, levels)

    def prefill(
        self, inputs: Int[Array, "b t"], lengths: Int[Array, " b"], max_length: int
    ) -> tuple[Float[Array, "b v"], Any]:
        """Logits after each row's last input and the cache behind it; rows are right-padded, lengths at least 1."""
        more = ()
        if self.config.chunker == "entropy":
            state, fires = self.patcher.behind(flat_ids(inputs, self.ids), lengths, max_length)
            more = ((begins_of(fires, segment_starts(None, *inputs.shape)), state),)
        elif self.told:
            more = ((self._told(inputs, None), told_behind(self.config.chunker, inputs, lengths)),)
        y, cache = self.backbone.prefill(self.embed(inputs), lengths, max_length, *more)
        return self._logits(pick(y, lengths - 1)), cache

    def step(self, inputs: Int[Array, " b"], cache: Any) -> tuple[Float[Array, "b v"], Any]:
        """Logits after one more input per row."""
        every = jnp.ones(inputs.shape, bool)
        if not self.told:
            y, cache = self.backbone.step(self.embed(inputs), cache, every)
            return self._logits(y), cache
        pending, cache = self.front(inputs, cache, every)
        return self.back(pending, self.ask_inner(pending, cache, pending.boundary), every)

    def front(
        self, inputs: Int[Array, " b"], cache: StageCache, active: Bool[Array, " b"]
    ) -> tuple[Pending, StageCache]:
        """The first half of a step of the active rows, up to the outermost router."""
        assert isinstance(self.backbone, Stage)
        boundary = None
        if isinstance(cache.told, PatchState):
            boundary = cache.told.next
            cache = replace(cache, told=self.patcher.read(flat_ids(inputs, self.ids), cache.told, active))
        elif cache.told is not None:
            state, boundary = told_step(self.config.chunker, self.config.targets[0], cache.told, inputs, active)
            cache = replace(cache, told=state)
        return self.backbone.front(self.embed(inputs), cache, active, boundary)

    def ask_inner(self, pending: Pending, cache: StageCache, rows: Bool[Array, " b"]) -> StageCache:
        """Runs the inner network for rows that stand at a boundary."""
        assert isinstance(self.backbone, Stage)
        return self.backbone.ask_inner(pending, cache, rows)

    def back(
        self, pending: Pending, cache: StageCache, active: Bool[Array, " b"]
    ) -> tuple[Float[Array, "b v"], StageCache]:
        """The second half of a step of the active rows: logits."""
        assert isinstance(self.backbone, Stage)
        y, cache = self.backbone.back(pending, cache, active)
        return self._logits(y), cache

    def extend(self, inputs: Int[Array, "b q"], cache: Any) -> tuple[Array, Any, Float[Array, "b q d"]]:
        """After each of several more inputs per row: logits [b, q, v]; the trail that `keep` reads; what the logits are
        made of, for heads of further bytes."""
        more, rule = (), None
        if self.config.chunker == "entropy":
            rule = self.patcher.read_several(flat_ids(inputs, self.ids), cache.told)
            more = (rule.begins(cache.told),)
        elif self.told:
            rule, boundary = told_extend(self.config.chunker, self.config.targets[0], cache.told, inputs)
            more = (boundary,)
        y, trail = self.backbone.extend(self.embed(inputs), cache, *more)
        return self._logits(y), (trail, rule), y

    def keep(self, cache: Any, trail: Any, kept: Int[Array, " b"]) -> Any:
        """The cache after the first `kept` inputs of a trail."""
        read, rule = trail
        new = self.backbone.keep(cache, read, kept)
        if rule is None:
            return new
        assert isinstance(new, StageCache)
        if isinstance(rule, PatchTrail):
            return replace(new, told=self.patcher.after(cache.told, rule, kept))
        return replace(new, told=jax.tree.map(lambda a, b: newest(a, kept, b), rule, cache.told))

    def alone(self, inputs: Int[Array, " b"], cache: Any) -> tuple[Float[Array, "b v"], Any]:
        """A step of the outermost encoder and decoder that does not ask the inner network: a guess."""
        assert isinstance(self.backbone, Stage)
        every = jnp.ones(inputs.shape, bool)
        told = ~every if self.told else None  # no rule need be asked
        pending, cache = self.backbone.front(self.embed(inputs), cache, every, told)
        return self.back(pending, cache, every)

    def empty_cache(self, b: int, max_length: int) -> Any:
        """The cache of rows that have seen nothing yet."""
        cache = self.backbone.empty_cache(b, max_length)
        if not isinstance(cache, StageCache) or not self.told:
            return cache
        entropy = self.config.chunker == "entropy"
        return replace(cache, told=self.patcher.no_bytes(b, max_length) if entropy else no_bytes(b))
