"""How many slots for chunks to try when rows are scored."""

import math

from bytelm.config import ModelConfig, UnitConfig
from bytelm.models.flops import target_bytes_per_chunk


class SlotGuess:
    """How many slots to try for the chunks of rows to score: as many as the model's usual chunks need with a margin of
    a half, in eighths of the row; every other place of a row of chunks would be computed for nothing. Too few are
    noticed, and the row is computed with all: what is guessed decides the time, not the result."""

    def __init__(self, config: ModelConfig):
        spans = target_bytes_per_chunk(config) if isinstance(config, UnitConfig) else ()
        self._shares = [min(math.ceil(8 * 1.5 / span) / 8, 1.0) for span in spans]
        self._tries = self._misses = 0

    def slots(self, width: int) -> tuple[int, ...] | None:
        """Slots of each level for rows so wide; None: all. Rows that are short, or mostly missed, get all."""
        if not self._shares or width < 64 or 4 * self._misses > self._tries + 4:
            return None
        return tuple(math.ceil(share * width) for share in self._shares)

    def enough(self, slots: tuple[int, ...], needs: list[int]) -> bool:
        """Whether rows that needed so many had them."""
        enough = all(need <= have for need, have in zip(needs, slots, strict=True))
        self._tries, self._misses = self._tries + 1, self._misses + (not enough)
        return enough
