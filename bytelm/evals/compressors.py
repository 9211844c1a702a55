"""Compressor lines to hold a model's bits per byte against.

"Given the same training text" is the size of train + test less the size of train, in bits per test byte: the fair line
for a model trained on train.
"""

import hashlib
import lzma
from dataclasses import dataclass

_XZ = {"format": lzma.FORMAT_XZ, "preset": 9 | lzma.PRESET_EXTREME}


@dataclass(frozen=True)
class Line:
    """One compressor on one split."""

    name: str
    bpb: float
    source: str


def xz_given(train: bytes, test: bytes) -> Line:
    """xz -9e on `test` after `train`, measured here (about a second per MB)."""
    size = len(lzma.compress(train + test, **_XZ)) - len(lzma.compress(train, **_XZ))
    return Line("xz", 8 * size / len(test), "xz -9e, measured here")


# Python ships no PPMd. Figures for two fixed splits, by sha256 of training and test text in a row (first 8 hex digits),
# as pyppmd 1.3.1 (variant H, order 8) and 7-Zip's PPMd (order 8, 1 GB) both give them; a test measures the first again.
PPMD = {
    "86c4e6aa": Line("PPMd", 2.035, "recorded: order 8, 7-Zip and pyppmd 1.3.1"),  # tiny Shakespeare, 90 / 10
    "7599acc2": Line("PPMd", 1.725, "recorded: order 8, 7-Zip and pyppmd 1.3.1"),  # dickens, 9.0 MB / last 0.59 MB
}


def ppmd_given(train: bytes, test: bytes) -> Line | None:
    """PPMd on `test` after `train`: by pyppmd where it is installed, else the recorded figure of a known split."""
    try:
        import pyppmd
    except ImportError:
        return PPMD.get(hashlib.sha256(train + test).hexdigest()[:8])

    def size(data: bytes) -> int:
        encoder = pyppmd.Ppmd7Encoder(8, min(2 << 30, max(64 << 20, 32 * len(data))))
        return len(encoder.encode(data)) + len(encoder.flush())

    return Line(
        "PPMd", 8 * (size(train + test) - size(train)) / len(test), "pyppmd (PPMd var. H, order 8), measured here"
    )
