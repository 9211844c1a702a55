"""Useful floating-point operations per byte, counted one way everywhere.

Matmuls only (one multiply-add = 2), no look-ups, causal attention at the keys really seen, windows honoured, the
Mamba-2 recurrence at its own cost (write and read of the state), not that of the chunked form. A training step costs
three forward passes.
"""

from bytelm.config import FlatConfig, StackConfig, parse_layout
from bytelm.vocab import NUM_SYMBOLS

TRAIN_FACTOR = 3


def mean_keys(t: int, window: int) -> float:
    """Mean number of keys a causal query sees in a row of t, at most `window` (0 = all)."""
    w = min(window or t, t)
    return (w * (w + 1) / 2 + (t - w) * w) / t


def stack_flops(config: StackConfig, t: int) -> float:
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


def forward_flops(config: FlatConfig, t: int) -> float:
    """Forward FLOPs per byte of a model on rows of t bytes."""
    return stack_flops(config.stack, t) + 2 * config.stack.d_model * NUM_SYMBOLS
