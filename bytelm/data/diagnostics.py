"""MrT5's diagnostic tasks (Kallini et al. 2025): random letters to be rewritten by a rule, so that what may be deleted
is known. Each text is "#" and letters; with the end symbol it fills its row."""

import re
from typing import Literal

import numpy as np

Diagnostic = Literal["vowels", "context_vowels", "merge", "copy"]
DIAGNOSTICS = ("vowels", "context_vowels", "merge", "copy")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
VOWELS = "aeiouAEIOU"
CONSONANTS = "".join(letter for letter in LETTERS if letter not in VOWELS)


def rewrite(text: str, task: Diagnostic) -> str:
    """What a task makes of a text: without vowels; without vowels directly behind a lowercase consonant; with D for
    each ABC; or the same."""
    if task == "vowels":
        return re.sub(f"[{VOWELS}]", "", text)
    if task == "context_vowels":
        return re.sub(f"([{CONSONANTS[:21]}])[{VOWELS}]", r"\1", text)
    return text.replace("ABC", "D") if task == "merge" else text


def diagnostic_text(task: Diagnostic, length: int, rng: np.random.Generator) -> str:
    """A text of `length` characters. The rule finds something to do about 25 times (pairs of consonant and vowel, of
    which half are lowercase) and 5 times (ABC) in 62 letters."""
    letters = rng.choice(list(LETTERS), length - 1)
    if task in ("context_vowels", "merge"):
        width = 2 if task == "context_vowels" else 3
        mean = (25 if width == 2 else 5) * (length - 1) / 62
        places = (length - 1) // width
        count = int(np.clip(round(rng.normal(mean, mean / 2)), 0, places))
        # Gaps spread over the text at random: `count` stretches that do not overlap, all arrangements equally likely.
        free = length - 1 - count * width
        starts = np.sort(rng.choice(free + count, count, replace=False)) + np.arange(count) * (width - 1)
        for start in starts:
            if width == 3:
                letters[start : start + 3] = list("ABC")
            else:
                letters[start] = rng.choice(list(CONSONANTS))
                letters[start + 1] = rng.choice(list(VOWELS))
    return "#" + "".join(letters)
