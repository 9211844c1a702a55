"""Texts that a tokenizer cuts wrongly: two words written as one, whose tokens are two other words ("moves" and "table"
as move, stable). Made for a given tokenizer, after "Tokenization Matters" (Wang et al. 2024); asked of any model.
"""

from collections.abc import Callable, Iterable, Sequence

from bytelm.config import ConfigError
from bytelm.data.noise import Draws
from bytelm.evals.choices import Question
from bytelm.evals.prompts import SHOTS, Case, ask_in_words

CHANCE = 1 / 2
Cut = Callable[[bytes], Sequence[int]]  # a text -> where its tokens begin


def traps(words: Iterable[str], cut: Cut, most: int, seed: int = 0) -> list[tuple[str, str, str, str]]:
    """At most `most` (first, second, wrong first, wrong second): the tokens of first + second, behind a quotation mark,
    end between the wrong ones and not between the right ones. Words are of three letters or more; in random order."""
    known = sorted({w for w in words if len(w) >= 3})
    held = set(known)
    found = []
    starts: dict[str, list[str]] = {}  # what a word begins with, where the rest may end another one
    for word in known:
        for size in range(1, len(word) - 2):
            starts.setdefault(word[:size], []).append(word)
    pairs = []
    for first in known:
        for size in range(3, len(first)):
            wrong, rest = first[:size], first[size:]
            if wrong in held:  # first = wrong + rest, and rest + second is a word
                for other in starts.get(rest, ()):
                    second = other[len(rest) :]
                    if second in held:
                        pairs += [(first, second, wrong, other), (wrong, other, first, second)]
    for first, second, wrong, other in Draws(seed, "traps").shuffled(pairs):
        ends = set(cut(f'"{first}{second}'.encode()))
        if 1 + len(wrong) in ends and 1 + len(first) not in ends:
            found.append((first, second, wrong, other))
            if len(found) == most:
                break
    return found


def questions(words: Iterable[str], cut: Cut, count: int, seed: int = 0) -> list[Question]:
    """Which two words a text is made of: the right ones, or those of its tokens. Raises ConfigError where the tokenizer
    falls into too few traps."""
    found = traps(words, cut, (count or 1000) + SHOTS, seed)
    if len(found) <= SHOTS:
        raise ConfigError(f"suite traps: the tokenizer cuts only {len(found)} pairs of these words wrongly")
    cases = [Case(f'Which two words, the first of {len(a)} letters, are in "{a}{b}"?', f"{a} {b}", (f"{c} {d}",))
             for a, b, c, d in found]  # fmt: skip
    return ask_in_words("", cases[:SHOTS], cases[SHOTS:])
