"""Span corruption as ByT5 was trained (Xue et al. 2022, section 3.2): stretches of bytes are taken out, and written as
the target. Pure numpy, on ids: bytes are id 3 and up, 1 ends a text, sentinels are the last byte ids, 258 downward.
"""

import numpy as np
from numpy.typing import NDArray

from bytelm.config import ConfigError
from bytelm.vocab import T5_IDS

FIRST_SENTINEL = 255 + T5_IDS.offset
SAFE_SENTINELS = 11  # 0xFF down to 0xF5 never occur in UTF-8; further ones would be bytes that text holds
Ids = NDArray[np.int32]


def noise_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """(noise ids, noise spans) of a text of `length` ids: at least one of each, and one id left of the text."""
    noise = min(max(round(length * density), 1), length - 1)
    return noise, max(min(round(noise / mean_span), noise, length - noise), 1)


def span_lengths(row: int, density: float, mean_span: float) -> tuple[int, int]:
    """(ids of text, ids of target): the most text whose corrupted form, with its end, fits a row of `row` ids.

    Raises ConfigError where no text does.
    """

    def lengths(n: int) -> tuple[int, int]:
        noise, spans = noise_counts(n, density, mean_span)
        return n - noise + spans + 1, noise + spans + 1

    if row < 4:
        raise ConfigError(f"data.seq_len={row}: span corruption needs rows of at least 4")
    length = row
    while lengths(length + 1)[0] <= row:
        length += 1
    while length > 2 and lengths(length)[0] > row:
        length -= 1
    if lengths(length)[0] > row:
        raise ConfigError(f"data.seq_len={row}: too short for span corruption with density {density}")
    spans = noise_counts(length, density, mean_span)[1]
    if spans > FIRST_SENTINEL - T5_IDS.offset:
        raise ConfigError(f"data.mean_span={mean_span}: {spans} spans per row, but there are 256 sentinels")
    return length, lengths(length)[1]


def _parts(total: int, parts: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`total` cut into non-empty parts, all ways equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def noise_mask(length: int, density: float, mean_span: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which ids of a text are noise: spans of text and of noise in turn, text first."""
    noise, spans = noise_counts(length, density, mean_span)
    lengths = np.stack([_parts(length - noise, spans, rng), _parts(noise, spans, rng)], axis=1).ravel()
    return np.repeat(np.tile([False, True], spans), lengths)


def _replaced(ids: Ids, taken: NDArray[np.bool_]) -> Ids:
    """The ids with each run of `taken` ones replaced by the next sentinel, and the end behind them."""
    starts = taken & ~np.concatenate([[False], taken[:-1]])
    sentinel = FIRST_SENTINEL + 1 - np.cumsum(starts)
    out = np.where(starts, sentinel, ids)[starts | ~taken]
    return np.append(out, T5_IDS.end).astype(np.int32)


def corrupt(ids: Ids, mask: NDArray[np.bool_]) -> tuple[Ids, Ids]:
    """(source, target) of a text and its noise mask: the text with a sentinel for each noise span, and the noise with a
    sentinel for each span of text."""
    return _replaced(ids, mask), _replaced(ids, ~mask)
