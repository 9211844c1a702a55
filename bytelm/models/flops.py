"""Useful floating-point operations per byte, counted one way everywhere.

Matmuls only (one multiply-add = 2), no look-ups, causal attention at the keys really seen, windows honoured, the
Mamba-2 recurrence at its own cost (write and read of the state), not that of the chunked form, chunks at their real
number (`bytes_per_chunk`), not at the slots reserved for them. A training step costs three forward passes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from bytelm.config import (
    AheadConfig,
    BLTConfig,
    FlatConfig,
    HATConfig,
    HNetConfig,
    MegaByteConfig,
    ModelConfig,
    SpaceByteConfig,
    StackConfig,
    T5Config,
    TokensConfig,
    UnitConfig,
    parse_layout,
)

TRAIN_FACTOR = 3


def mean_keys(t: float, window: int) -> float:
    """Mean number of keys a causal query sees in a row of t, at most `window` (0 = all)."""
    w = min(window or t, t)
    return (w * (w + 1) / 2 + (t - w) * w) / t


def stack_flops(config: StackConfig, t: float) -> float:
    """Forward FLOPs per position of a stack on rows of t positions."""
    d, width, s = config.d_model, config.head_width, config.ssm
    inner = s.expand * d
    mixer = {
        "t": 4 * d * width * (config.num_heads + config.kv_heads)
        + 4 * config.num_heads * width * mean_keys(t, config.window),
        "m": 2 * d * (2 * inner + 2 * s.d_state + config.ssm_heads) + 2 * inner * d + 4 * inner * s.d_state,
    }
    mlp = (6 if config.mlp == "swiglu" else 4) * d * config.mlp_width
    return float(
        sum(count * (mixer[kind.lower()] + mlp * kind.isupper()) for kind, count in parse_layout(config.layout))
    )


def ahead_flops(config: AheadConfig, d: int, symbols: int) -> float:
    """FLOPs per byte of heads for further bytes, which every training step runs, and decoding if they draft."""
    return 2.0 * config.bytes * (d * d + d * symbols)


def target_bytes_per_chunk(config: ModelConfig) -> tuple[float, ...]:
    """Bytes per unit of each level before anything is measured. H-Net: if every level meets its target, the products of
    the targets; words and patches: what English has (4.4 with the Unicode rule, else 5.5), the patch, or 4.5 by
    entropy, where the threshold decides."""
    if isinstance(config, TokensConfig):
        return (3.5,)  # of 4,096 tokens on English
    if isinstance(config, MegaByteConfig):
        return (float(config.patch),)
    if isinstance(config, SpaceByteConfig):
        return (float(config.period) if config.patches == "periodic" else 5.5,)
    if isinstance(config, BLTConfig):
        return (4.5,)
    if isinstance(config, HATConfig):
        return (4.4 if config.rule == "unicode" else 5.5,)
    if not isinstance(config, HNetConfig):
        return ()
    return tuple(math.prod(config.targets[: level + 1]) for level in range(config.levels))


def t5_flops(config: T5Config, source: int, targets: int, kept: float) -> float:
    """Forward FLOPs per byte of source of an encoder-decoder on rows of `source` and `targets` ids, when a share `kept`
    of the source goes on behind the encoder's first blocks."""
    d, inner, mlp = config.d_model, config.num_heads * config.head_dim, 6 * config.d_model * config.d_mlp
    slots = kept * source
    project, behind = 8 * d * inner, config.encoder_layers - config.first_layers
    whole = config.first_layers * (project + mlp + 4 * inner * source)
    left = kept * behind * (project + mlp + 4 * inner * slots)
    cross = 4 * d * inner * kept * config.decoder_layers  # keys and values of the encoder's slots
    own = project + 4 * inner * mean_keys(targets, 0) + 4 * d * inner + 4 * inner * slots + mlp
    decoder = (config.decoder_layers * own + 2 * d * config.vocabulary) * targets / source
    return whole + left + cross + decoder


def trained_kept(config: T5Config, record: Mapping[str, float]) -> float:
    """Share of the source behind the first blocks in a training step, given its metrics: soft and masked deletion keep
    every slot."""
    d = config.deletion
    if d.kind in ("boundary", "convolution"):
        return 1 - d.rate
    return 1 - record.get("deletion/rate", d.rate) if d.gated and d.train == "compact" else 1.0


def unit_stacks(model: UnitConfig, t: int, slots: Sequence[int]) -> list[tuple[StackConfig, int]]:
    """Every stack of a model with units, and the elements of a row that it runs over."""
    if isinstance(model, HATConfig):
        return [(model.encoder, t), (model.backbone, slots[0]), (model.decoder, t)]
    if isinstance(model, BLTConfig):
        return [(model.encoder, t), (model.main, slots[0]), (model.decoder, t)]
    if isinstance(model, SpaceByteConfig):
        return [(model.initial, t), (model.main, slots[0]), (model.final, t)]
    if isinstance(model, MegaByteConfig):
        return [(model.main, slots[0]), (replace(model.local, window=model.patch), t)]
    parts = lambda s: ("encoder", "decoder") if s < model.levels else ("main",)  # noqa: E731
    return [(model.stack(s, part), elements) for s, elements in enumerate((t, *slots)) for part in parts(s)]


def reader_flops(c: HATConfig, t: float, span: float) -> float:
    """Forward FLOPs per byte of a HAT's encoder and pooling with `span` bytes a word."""
    d, wider = c.encoder.d_model, c.backbone.d_model
    kv = (c.pool_kv_heads or c.pool_heads) / c.pool_heads
    return stack_flops(c.encoder, t) + 4 * d * wider * kv + 4 * wider + 2 * wider * wider / span


def writer_flops(c: HATConfig, t: float, span: float) -> float:
    """Forward FLOPs per byte of a HAT's guides, decoder and head."""
    d, wider = c.decoder.d_model, c.backbone.d_model
    guide_kv = (c.guide_kv_heads or c.guide_heads) / c.guide_heads
    guided = sum(n for _, n in parse_layout(c.decoder.layout)) if c.guide_every_layer else 1
    per_word = guided * (2 * wider * d * guide_kv + 2 * d * d)
    return stack_flops(c.decoder, t) + 2 * d * 256 + per_word / span


def hat_flops(c: HATConfig, t: float, span: float) -> float:
    """Forward FLOPs per byte of a HAT."""
    return reader_flops(c, t, span) + writer_flops(c, t, span) + stack_flops(c.backbone, max(t / span, 1.0)) / span


def spacebyte_flops(c: SpaceByteConfig, t: float, span: float) -> float:
    """Forward FLOPs per byte of a SpaceByte with `span` bytes a patch."""
    local = stack_flops(c.initial, t) + stack_flops(c.final, t) + 2 * c.initial.d_model * 256
    return local + stack_flops(c.main, max(t / span, 1.0)) / span


def megabyte_flops(c: MegaByteConfig, t: float, span: float) -> float:
    """Forward FLOPs per byte of a MegaByte with `span` bytes a patch (more than c.patch only by short documents)."""
    d = c.local.d_model
    local = stack_flops(c.local, c.patch) + 2 * d * 256 + 2 * c.main.d_model / c.patch * d
    return local + stack_flops(c.main, max(t / span, 1.0)) / span


def blt_flops(c: BLTConfig, t: float, span: float) -> float:
    """Forward FLOPs per byte of a BLT with `span` bytes a patch; without the patcher, which training does not run."""
    d, wider, k = c.encoder.d_model, c.main.d_model, c.queries
    heads = lambda s: (s.num_heads * s.head_width, s.kv_heads * s.head_width)  # noqa: E731
    (inner, kv), (inner2, kv2) = heads(c.encoder), heads(c.decoder)
    reads = sum(n for _, n in parse_layout(c.decoder.layout)) if c.read_every_layer else 1
    per_byte = stack_flops(c.encoder, t) + stack_flops(c.decoder, t) + 2 * d * 260
    per_byte += 4 * d * kv + 4 * k * inner + reads * (4 * d * inner2 + 4 * k * inner2)
    per_patch = k * (2 * d * d + 4 * d * inner + 2 * wider * d + reads * 4 * d * kv2)
    per_patch += 2 * k * d * wider if k * d != wider else 0
    return per_byte + (per_patch + stack_flops(c.main, max(t / span, 1.0))) / span


def forward_flops(config: FlatConfig | UnitConfig, t: int, bytes_per_chunk: Sequence[float] = ()) -> float:
    """Forward FLOPs per byte of a model on rows of t bytes (or tokens). `bytes_per_chunk`: bytes per unit of each
    level, or per token (default: `target_bytes_per_chunk`)."""
    if isinstance(config, FlatConfig):
        each = stack_flops(config.stack, t) + 2 * config.stack.d_model * config.symbols
        each += ahead_flops(config.ahead, config.stack.d_model, config.symbols)
        return each / (bytes_per_chunk or target_bytes_per_chunk(config) or (1.0,))[0]
    spans = (1.0, *(bytes_per_chunk or target_bytes_per_chunk(config)))
    if isinstance(config, HATConfig):
        return hat_flops(config, t, spans[1])
    if isinstance(config, SpaceByteConfig):
        return spacebyte_flops(config, t, spans[1])
    if isinstance(config, MegaByteConfig):
        return megabyte_flops(config, t, spans[1])
    if isinstance(config, BLTConfig):
        return blt_flops(config, t, spans[1])
    total = 2.0 * config.d_model[0] * 256 + ahead_flops(config.ahead, config.d_model[0], 256)
    for s, span in enumerate(spans):
        rows = max(t / span, 1.0)
        if s == config.levels:
            return total + stack_flops(config.stack(s, "main"), rows) / span
        d = config.d_model[s]
        ends = sum(stack_flops(config.stack(s, part), rows) for part in ("encoder", "decoder"))
        routed = s > 0 or config.chunker == "learned"
        total += (ends + (3 if routed else 1) * 2 * d * d) / span  # the residual's projection and the router's two
    raise AssertionError("a stage is missing")
