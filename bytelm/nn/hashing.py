"""Hashes of the last bytes of a text (BLT, Pagnoni et al. 2024, arXiv 2412.09871, section 3.2.1): sum_i id_i prime^i in
wrapping signed 64-bit integers, modulo the size of a table; the oldest id has power 0.

jax has no 64-bit integers unless all of it is switched to them, so the sum is kept in 16-bit limbs, in uint32: exact on
every device.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from numpy.typing import NDArray

# One for each hash function, as published.
PRIMES = (
    1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899, 9576890767, 3628273133, 2860486313,
    5463458053, 3367900313,
)  # fmt: skip
MAX_TABLE = 1 << 23  # rows: a remainder and 8 more bits must fit into uint32
MAX_IDS = 64  # so many products of an id (below 2^10) and a limb fit into uint32


def _limbs(prime: int, n: int) -> NDArray[np.uint32]:
    """prime^0 .. prime^(n-1) modulo 2^64 as [n, 4] limbs of 16 bits, lowest first."""
    powers = [pow(prime, i, 1 << 64) for i in range(n)]
    return np.array([[(p >> (16 * j)) & 0xFFFF for j in range(4)] for p in powers], np.uint32)


def ngram_hashes(windows: Int[Array, "*b n"], prime: int, size: int) -> Int[Array, "*b"]:
    """The row of a table of `size` rows for each window of ids, oldest first; ids are below 1,024."""
    n = windows.shape[-1]
    assert n <= MAX_IDS and size <= MAX_TABLE
    # Each below 2^32: 64 ids of 10 bits times 16 bits, and a carry of 16 bits.
    sums = jnp.sum(windows.astype(jnp.uint32)[..., None] * _limbs(prime, n), axis=-2, dtype=jnp.uint32)
    carry, digits = jnp.zeros(windows.shape[:-1], jnp.uint32), []
    for j in range(4):
        total = carry + sums[..., j]
        digits.append(total & 0xFFFF)
        carry = total >> 16
    rest = jnp.zeros_like(carry)
    for digit in reversed(digits):
        for byte in (digit >> 8, digit & 0xFF):
            rest = (rest * 256 + byte) % size
    negative = digits[3] >= 0x8000  # as a signed number it is 2^64 less
    wrapped = jnp.uint32(pow(2, 64, size))
    return jnp.where(negative, (rest + size - wrapped) % size, rest).astype(jnp.int32)
