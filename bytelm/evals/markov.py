"""Sources whose best possible loss is known: binary, each symbol depending on the one k places back alone.

P(1 after 0) = p and P(0 after 1) = q; with p + q far from 1 and k > 1 neighbouring symbols say nothing of each other,
and a model must look k back. Rajaraman et al. 2024 ("Toward a theory of tokenization") find that transformers over the
characters stay at the loss of a model that knows the frequencies only, and that tokens get them off it.
"""

import math

import numpy as np


def source_text(length: int, k: int, p: float, q: float, seed: int) -> bytes:
    """A text of so many symbols 0 and 1, from the stationary law on."""
    rng = np.random.default_rng([seed, k])
    draws = rng.random(length)
    out = np.zeros(length, np.uint8)
    out[:k] = draws[:k] < p / (p + q)
    for first in range(k, length, k):  # k chains side by side
        before, now = out[first - k : first], draws[first : first + k]
        before = before[: len(now)]
        out[first : first + len(now)] = np.where(before == 0, now < p, now >= q)
    return (out + ord("0")).tobytes()


def binary_entropy(p: float) -> float:
    """Bits."""
    return sum(-x * math.log2(x) for x in (p, 1 - p) if x > 0)


def best_bits(p: float, q: float) -> float:
    """Bits a symbol of a model that knows the source."""
    return (q * binary_entropy(p) + p * binary_entropy(q)) / (p + q)


def frequency_bits(p: float, q: float) -> float:
    """Bits a symbol of a model that knows how frequent the symbols are, and nothing else."""
    return binary_entropy(p / (p + q))
