"""Nominal figures of accelerators, and the matmul rate measured on the device at hand.

Figures are the vendors' dense 16-bit matmul rate, memory and memory bandwidth of one chip (Google Cloud TPU
documentation "TPU v4 / v5e / v5p / v6e / TPU7x"; NVIDIA data sheets of A100, H100, H200, B200, L4), and the bandwidth
of the chip's links to its neighbours, all directions together.
"""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Chip:
    """One accelerator chip."""

    name: str
    flops: float  # dense bf16 FLOP/s
    memory: float  # bytes
    bandwidth: float  # bytes/s to its memory
    link: float  # bytes/s to other chips


CHIPS: dict[str, Chip] = {
    "v4": Chip("TPU v4", 275e12, 32 * 2**30, 1228e9, 300e9),
    "v5e": Chip("TPU v5e", 197e12, 16 * 2**30, 819e9, 200e9),
    "v5p": Chip("TPU v5p", 459e12, 95 * 2**30, 2765e9, 600e9),
    "v6e": Chip("TPU v6e", 918e12, 32 * 2**30, 1640e9, 448e9),
    "7x": Chip("TPU7x", 2307e12, 192 * 2**30, 7380e9, 1200e9),
    "a100": Chip("NVIDIA A100 80GB", 312e12, 80e9, 2039e9, 600e9),
    "h100": Chip("NVIDIA H100 SXM", 989e12, 80e9, 3350e9, 900e9),
    "h200": Chip("NVIDIA H200", 989e12, 141e9, 4800e9, 900e9),
    "b200": Chip("NVIDIA B200", 2250e12, 180e9, 7700e9, 1800e9),
    "l4": Chip("NVIDIA L4", 121e12, 24e9, 300e9, 64e9),
}

# What jax calls the device -> row of the table; the first text found in device_kind counts.
_KINDS = (
    ("v5 lite", "v5e"), ("v5e", "v5e"), ("v5p", "v5p"), ("v5", "v5p"), ("v6", "v6e"), ("tpu7x", "7x"), ("v7x", "7x"),
    ("v4", "v4"), ("a100-sxm4-80gb", "a100"), ("a100 80gb", "a100"), ("h200", "h200"), ("h100 80gb hbm3", "h100"),
    ("h100 sxm", "h100"), ("b200", "b200"), ("l4", "l4"),
)  # fmt: skip


_OTHERS = ("l40", "gh200", "gb200", "pcie")  # look alike, and are other chips


def find_chip(device_kind: str) -> Chip | None:
    """The table's row for a device that jax describes so; None for one that is not in it (a CPU, say)."""
    kind = device_kind.lower()
    return next((CHIPS[row] for text, row in _KINDS if text in kind and not any(x in kind for x in _OTHERS)), None)


def measured_matmul_rate(dtype: str, seconds: float = 0.3) -> float:
    """FLOP/s of square matmuls on one local device: the best of repeated products within about `seconds`."""
    cpu = jax.default_backend() == "cpu"
    n, wide = (1024, jnp.float32) if cpu else (8192, None)  # bfloat16 is fast on CPU where it adds up in float32
    with jax.default_device(jax.local_devices()[0]):
        x = jax.random.normal(jax.random.key(0), (n, n), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=wide))
    product(x).block_until_ready()
    best, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        jnp.asarray(product(x)).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
