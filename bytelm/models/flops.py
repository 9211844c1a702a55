"""Useful floating-point operations per byte, counted one way everywhere.

Matmuls only (one multiply-add = 2), no look-ups, causal attention at the keys really seen, windows honoured, the
Mamba-2 recurrence at its own cost (write and read of the state), not that of the chunked form, chunks at their real
number (`bytes_per_chunk`), not at the slots reserved for them. A training step costs three forward passes.
"""

import math
from collections.abc import Mapping, Sequence

from bytelm.config import FlatConfig, HNetConfig, StackConfig, T5Config, parse_layout
from bytelm.vocab import NUM_SYMBOLS

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
    mlp = 6 * d * config.mlp_width
    return float(
        sum(count * (mixer[kind.lower()] + mlp * kind.isupper()) for kind, count in parse_layout(config.layout))
    )


def target_bytes_per_chunk(config: HNetConfig) -> tuple[float, ...]:
    """Bytes per chunk of each level if every level meets its target: the products of the targets."""
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


def forward_flops(config: FlatConfig | HNetConfig, t: int, bytes_per_chunk: Sequence[float] = ()) -> float:
    """Forward FLOPs per byte of a model on rows of t bytes. `bytes_per_chunk`: bytes per chunk of each level of an
    H-Net (default: its targets)."""
    if isinstance(config, FlatConfig):
        return stack_flops(config.stack, t) + 2 * config.stack.d_model * NUM_SYMBOLS
    spans = (1.0, *(bytes_per_chunk or target_bytes_per_chunk(config)))
    total = 2.0 * config.d_model[0] * 256
    for s, span in enumerate(spans):
        rows = max(t / span, 1.0)
        if s == config.levels:
            return total + stack_flops(config.stack(s, "main"), rows) / span
        d = config.d_model[s]
        ends = sum(stack_flops(config.stack(s, part), rows) for part in ("encoder", "decoder"))
        total += (ends + 3 * 2 * d * d) / span  # the router's two projections and the residual's
    raise AssertionError("a stage is missing")
