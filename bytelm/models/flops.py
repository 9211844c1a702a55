"""Useful floating-point operations per byte, counted one way everywhere.

Matmuls only (one multiply-add = 2), no look-ups, causal attention at the keys really seen, windows honoured, the
Mamba-2 recurrence at its own cost (write and read of the state), not that of the chunked form, chunks at their real
number (`bytes_per_chunk`), not at the slots reserved for them. A training step costs three forward passes.
"""

import math
from collections.abc import Sequence

from bytelm.config import FlatConfig, HNetConfig, ModelConfig, StackConfig, parse_layout
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


def forward_flops(config: ModelConfig, t: int, bytes_per_chunk: Sequence[float] = ()) -> float:
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
