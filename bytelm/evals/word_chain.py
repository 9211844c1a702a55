"""Words that a model would write right, byte by byte, in running text: each of a word's bytes is the most probable one
after what stands before it. By how frequent the words are."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bytelm.config import ConfigError
from bytelm.evals.word_tasks import WORD
from bytelm.protocol import ByteLM

BANDS = (100, 1000, 10_000)  # ranks that end a band; the last band is open


def word_unit(
    lm: ByteLM, documents: Sequence[bytes], counts: Mapping[str, int]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Share of the words of each band of frequency whose bytes are all right, and how many there are."""
    ranks = {word: n for n, word in enumerate(sorted(counts, key=lambda w: (-counts[w], w)))}
    right, total = np.zeros(len(BANDS) + 1), np.zeros(len(BANDS) + 1)
    for text, score in zip(documents, lm.score_batch(documents)):
        if score.greedy is None:
            raise ConfigError("this model's scores do not say which bytes were the most probable")
        shown = text.decode("utf-8", "surrogateescape")
        byte = np.cumsum([0, *(len(c.encode("utf-8", "surrogateescape")) for c in shown)])  # where characters begin
        for found in WORD.finditer(shown):
            band = int(np.searchsorted(BANDS, ranks.get(found[0], BANDS[-1]), side="right"))
            total[band] += 1
            right[band] += bool(score.greedy[byte[found.start()] : byte[found.end()]].all())
    names = [f"top_{BANDS[0]}", *(f"to_{end}" for end in BANDS[1:]), "rarer"]
    share = {f"accuracy_{n}": float(r / t) if t else float("nan") for n, r, t in zip(names, right, total)}
    return {**share, **{f"words_{n}": float(t) for n, t in zip(names, total)},
            "accuracy": float(right.sum() / max(total.sum(), 1))}, {}  # fmt: skip
