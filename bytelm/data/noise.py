"""Noise on texts: the rules by which robustness to spelling is measured, and a pipeline may corrupt what it reads.

Every rule works on Unicode code points; bytes that are no UTF-8 count as one each. What a rule draws depends on
(seed, document, rule, field) alone, so that a text is noised alike in any process and order. Where a paper leaves a
point free, the docstring says what is chosen. Sources: BLT (Pagnoni et al. 2024, section 6.1), whose five rules
H-Net's HellaSwag scores use too; ByT5 (Xue et al. 2022, section 5); HAT (Neitemeier et al. 2025).
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bytelm.config import ConfigError

WORDS = re.compile(r"\S+")
LETTERS = re.compile(r"[^\W\d_]+")
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # each key lies between two of the row above
NEIGHBOURS = {
    key: "".join(
        other
        for r, keys in enumerate(_ROWS)
        for c, other in enumerate(keys)
        if (r == row and abs(c - column) == 1) or (r == row - 1 and c - column in (0, 1)) or
        (r == row + 1 and c - column in (-1, 0))
    )
    for row, line in enumerate(_ROWS)
    for column, key in enumerate(line)
}  # fmt: skip


class Draws:
    """A stream of random numbers that depends on its keys alone: raw words of Philox, whose output numpy promises."""

    def __init__(self, *keys: int | str):
        digest = hashlib.sha256("\x1f".join(map(str, keys)).encode("utf-8", "surrogatepass")).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    def uniform(self, n: int) -> NDArray[np.float64]:
        """n numbers in [0, 1)."""
        return np.ldexp((self._bits.random_raw(n) >> np.uint64(11)).astype(np.float64), -53)

    def below(self, limit: int) -> int:
        """A whole number in 0 .. limit - 1."""
        return int(self._bits.random_raw()) % limit  # 2^-50 from even for the small limits here

    def shuffled(self, items: list) -> list:
        """A copy in random order."""
        return [items[i] for i in np.argsort(self.uniform(len(items)), kind="stable")]


Noise = Callable[[str, Draws], str]


def antspeak(text: str, draws: Draws) -> str:
    """BLT's AntSpeak: upper case, with a space between every two characters (so that a space becomes three)."""
    return " ".join(text.upper())


def antspeak_byt5(text: str, draws: Draws) -> str:
    """ByT5's Antspeak: each character in upper case with a space in front, one behind the last; the text's own white
    space vanishes: "an owl" -> " A N O W L "."""
    return "".join(f" {c}" for c in text.upper() if not c.isspace()) + " "


def drop(text: str, draws: Draws, rate: float = 0.1) -> str:
    """Each character is left out with probability `rate`."""
    return "".join(c for c, u in zip(text, draws.uniform(len(text))) if u >= rate)


def random_case(text: str, draws: Draws) -> str:
    """Each character in upper or lower case, evenly."""
    return "".join(c.upper() if u < 0.5 else c.lower() for c, u in zip(text, draws.uniform(len(text))))


def repeat(text: str, draws: Draws, rate: float = 0.2) -> str:
    """Each character is followed, with probability `rate`, by one to three copies of itself (evenly)."""
    chosen, copies = draws.uniform(len(text)), draws.uniform(len(text))
    return "".join(c * (2 + int(3 * n)) if u < rate else c for c, u, n in zip(text, chosen, copies))


def upper(text: str, draws: Draws) -> str:
    """Upper case (which may lengthen a text: ß)."""
    return text.upper()


def word_permute(text: str, draws: Draws, rate: float = 0.1) -> str:
    """HAT's: characters of words, each with probability `rate`, change places with another of their word, drawn
    evenly. White space stays."""

    def permuted(word: str) -> str:
        letters = list(word)
        for i in np.flatnonzero(draws.uniform(len(letters)) < rate):
            if len(letters) > 1:
                other = (i + 1 + draws.below(len(letters) - 1)) % len(letters)
                letters[i], letters[other] = letters[other], letters[i]
        return "".join(letters)

    return WORDS.sub(lambda found: permuted(found[0]), text)


def word_replace(text: str, draws: Draws, rate: float = 0.1) -> str:
    """HAT's: characters of words, each with probability `rate`, become a random letter a-z. White space stays."""

    def replaced(word: str) -> str:
        drawn = draws.uniform(len(word))
        return "".join(ALPHABET[draws.below(26)] if u < rate else c for c, u in zip(word, drawn))

    return WORDS.sub(lambda found: replaced(found[0]), text)


def word_delete(text: str, draws: Draws, rate: float = 0.1) -> str:
    """HAT's: characters of words are left out, each with probability `rate`. White space stays."""
    return WORDS.sub(lambda found: drop(found[0], draws, rate), text)


def _typos(edit: Callable[[str, int, Draws], str | None]) -> Noise:
    """A rule of one slip of a hand: in 30 % of the words of four letters or more, at an inner letter. `edit` gives the
    word with the slip at a place, or None where there is none to be made."""

    def noise(text: str, draws: Draws, rate: float = 0.3) -> str:
        def slip(found: re.Match) -> str:
            word = found[0]
            if len(word) < 4 or draws.uniform(1)[0] >= rate:
                return word
            return edit(word, 1 + draws.below(len(word) - 2), draws) or word

        return LETTERS.sub(slip, text)

    return noise


def _key_beside(letter: str, draws: Draws) -> str | None:
    keys = NEIGHBOURS.get(letter.lower())
    if keys is None:
        return None
    key = keys[draws.below(len(keys))]
    return key.upper() if letter.isupper() else key


def _delete(word: str, place: int, draws: Draws) -> str:
    return word[:place] + word[place + 1 :]


def _swap(word: str, place: int, draws: Draws) -> str:
    place = min(place, len(word) - 3)  # the letter behind it is an inner one too
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def _press_beside(word: str, place: int, draws: Draws) -> str | None:
    key = _key_beside(word[place], draws)
    return key and word[:place] + key + word[place + 1 :]


def _press_both(word: str, place: int, draws: Draws) -> str:
    key = _key_beside(word[place], draws) or word[place]
    return word[:place] + key + word[place:]


typo_delete, typo_swap, typo_keyboard, typo_insert = map(_typos, (_delete, _swap, _press_beside, _press_both))
"""An inner letter is left out; changes places with the next inner one; becomes a key beside its own (US qwerty; other
letters stay); gets such a key (others: a copy) in front of it."""

BLT_RULES: dict[str, Noise] = {
    "antspeak": antspeak, "drop": drop, "random_case": random_case, "repeat": repeat, "upper": upper,
}  # fmt: skip
RULES: dict[str, Noise] = BLT_RULES | {
    "antspeak_byt5": antspeak_byt5,
    "word_permute": word_permute, "word_replace": word_replace, "word_delete": word_delete,
    "typo_delete": typo_delete, "typo_swap": typo_swap, "typo_keyboard": typo_keyboard, "typo_insert": typo_insert,
}  # fmt: skip


def misspeller(path: Path, rate: float = 1.0) -> Noise:
    """A rule that misspells words as people do: each word with a misspelling in the list at `path` gets one of its own
    with probability `rate`, with its capitals. Lines are `typo->word` (codespell's dictionary; of several words with
    commas between them the first) or `typo TAB word`. Raises ConfigError for a file without such lines."""
    wrong = read_misspellings(path)

    def noise(text: str, draws: Draws) -> str:
        def misspelt(found: re.Match) -> str:
            choices = wrong.get(found[0].lower())
            if not choices or draws.uniform(1)[0] >= rate:
                return found[0]
            return like(choices[draws.below(len(choices))], found[0])

        return LETTERS.sub(misspelt, text)

    return noise


def read_misspellings(path: Path) -> dict[str, list[str]]:
    """Misspellings of each word, in lower case and in the order of the file (see `misspeller`)."""
    found: dict[str, list[str]] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: is no UTF-8 text ({e.reason} at byte {e.start})") from None
    for line in text.splitlines():
        typo, arrow, words = line.partition("->") if "->" in line else line.partition("\t")
        typo, word = typo.strip().lower(), words.split(",")[0].strip().lower()
        if arrow and LETTERS.fullmatch(typo) and LETTERS.fullmatch(word) and typo != word:
            found.setdefault(word, []).append(typo)
    if not found:
        raise ConfigError(f"{path}: no line `typo->word` or `typo TAB word`")
    return found


def like(word: str, model: str) -> str:
    """`word` with the capitals of `model`: all, the first, or none."""
    if model.isupper() and len(model) > 1:
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word


def noised(text: bytes, rule: str | Noise, *, seed: int, document: int | str, field: str = "", name: str = "") -> bytes:
    """A text noised by a rule of `RULES`, or by another with its `name`."""
    if isinstance(rule, str):
        if rule not in RULES:
            raise ConfigError(f"noise {rule!r}: choose {', '.join(RULES)}")
        rule, name = RULES[rule], rule
    characters = text.decode("utf-8", "surrogateescape")
    return rule(characters, Draws(seed, document, name, field)).encode("utf-8", "surrogateescape")
