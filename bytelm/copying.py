"""Guesses without a model: what followed the last place where the end of a text stood before (aggressive decoding, Ge
et al. 2022; prompt lookup; CopySpec). And the counts that every way to draft keeps."""

from dataclasses import dataclass

LENGTHS = (8, 32)  # symbols that are read at once, the first of them drawn, not guessed: many while guesses are right
LONGEST, SHORTEST = 24, 4  # bytes of the text's end that are looked for


@dataclass
class Counts:
    """What drafted decoding did, over all rows."""

    passes: int = 0  # readings of several symbols at once
    single: int = 0  # readings of one
    drafted: int = 0  # symbols guessed
    right: int = 0  # of these, the ones kept
    made: int = 0  # bytes of text

    def add(self, *, several: bool, drafted: int, right: int, made: int) -> None:
        """One reading."""
        self.passes, self.single = self.passes + several, self.single + (not several)
        self.drafted, self.right, self.made = self.drafted + drafted, self.right + right, self.made + made


def copied(text: bytes, count: int, source: bytes = b"") -> bytes:
    """Up to `count` bytes that followed the latest earlier place where the end of the text stands, the longest end that
    stands anywhere; empty where not even SHORTEST bytes do.

    `source` is a text in front, which may be copied from too; from its beginning where the text is as yet like it.
    """
    if len(text) < SHORTEST and source:
        return source[len(text) :][:count] if source.startswith(text) else b""
    everything = source + b"\n" + text if source else text
    length = LONGEST
    while length >= SHORTEST:
        if length < len(everything) and length <= len(text):
            found = everything.rfind(text[-length:], 0, len(everything) - 1)
            if found >= 0:
                return everything[found + length : found + length + count]
        length = length * 2 // 3 if length > 6 else length - 1
    return b""


def next_length(sizes: tuple[int, int], now: int, read: int, kept: int) -> int:
    """How many symbols to read at once next, after a reading of several of which `kept` were right."""
    share = kept / read
    return sizes[-1] if share > 0.9 else sizes[0] if share < 0.5 else now
