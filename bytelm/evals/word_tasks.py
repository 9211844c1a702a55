"""Tasks made from a list of words: CharBench's four, and probes of what a model knows of the characters in a word.

CharBench (Uzan & Pinter, AAAI 2026) publishes how its questions are made, not a list: words of 4 to 10 letters, each
used for one task; the place or count asked for is a number, upper and lower case differ. The words here are sorted
before the seed shuffles them, so that the same text gives the same questions. The probes follow the ideas of
"Tokenization Falling Short" (Chai et al. 2024): the n-th character, changes of case, substrings, what two words share,
unscrambling.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from bytelm.config import ConfigError
from bytelm.data.noise import ALPHABET, Draws
from bytelm.evals.choices import Question, corruptions
from bytelm.evals.prompts import SHOTS, Case, ask_in_words

WORD = re.compile(r"\b[a-zA-Z]+\b")
NUMBERS = tuple(map(str, range(11)))


def words_of(texts: Iterable[bytes]) -> Counter[str]:
    """How often each word of letters a-z and A-Z occurs, case kept."""
    found: Counter[str] = Counter()
    for text in texts:
        found.update(WORD.findall(text.decode("utf-8", "replace")))
    return found


def frequent(words: Counter[str], count: int = 1000, shortest: int = 1) -> list[str]:
    """The most frequent words of at least `shortest` letters in lower case, most frequent first, ties in order of the
    alphabet."""
    lower: Counter[str] = Counter()
    for word, times in words.items():
        if len(word) >= shortest:
            lower[word.lower()] += times
    return sorted(lower, key=lambda w: (-lower[w], w))[:count]


def _count(word: str, draws: Draws, words: Sequence[str]) -> Case:
    letter = word[draws.below(len(word))]
    return _number(f'How many times is "{letter}" in "{word}"?', word.count(letter))


def _unique(word: str, draws: Draws, words: Sequence[str]) -> Case:
    return _number(f'How many different characters are in "{word}"?', len(set(word)))


def _first(word: str, draws: Draws, words: Sequence[str]) -> Case:
    letter = word[draws.below(len(word))]
    return _number(f'At which place, counted from 0, is "{letter}" first in "{word}"?', word.index(letter))


def _last(word: str, draws: Draws, words: Sequence[str]) -> Case:
    letter = word[draws.below(len(word))]
    return _number(f'At which place, counted from 0, is "{letter}" last in "{word}"?', word.rindex(letter))


def _number(asked: str, answer: int) -> Case:
    return Case(asked, str(answer), tuple(n for n in NUMBERS if n != str(answer)))


def _letters(asked: str, answer: str, draws: Draws, others: Sequence[str] = ()) -> Case:
    """A case whose wrong answers are `others` (those that differ) and slips."""
    wrong = [other for other in dict.fromkeys(others) if other != answer]
    slips = ("".join(slip) for slip in corruptions(list(answer), draws, 3 + len(wrong), ALPHABET))
    wrong += [slip for slip in slips if slip not in wrong]
    return Case(asked, answer, tuple(wrong[:3]))


def _nth(word: str, draws: Draws, words: Sequence[str]) -> Case:
    n = draws.below(len(word))
    others = draws.shuffled(sorted(set(word) - {word[n]}))
    return _letters(f'Which is letter {n + 1} of "{word}"?', word[n], draws, others)


def _nth_last(word: str, draws: Draws, words: Sequence[str]) -> Case:
    n = draws.below(len(word))
    others = draws.shuffled(sorted(set(word) - {word[-1 - n]}))
    return _letters(f'Which is letter {n + 1} of "{word}", counted from its end?', word[-1 - n], draws, others)


def _case(word: str, draws: Draws, words: Sequence[str]) -> Case:
    mixed = "".join(c.upper() if draws.below(2) else c.lower() for c in word)
    others = [word.lower(), word.capitalize(), mixed]
    return _letters(f'Write "{word.lower()}" in capitals.', word.upper(), draws, others)


def _substring(word: str, draws: Draws, words: Sequence[str]) -> Case:
    size = 2 + draws.below(min(len(word) - 3, 3))
    starts = draws.shuffled(list(range(len(word) - size + 1)))
    inside = word[starts[0] : starts[0] + size].lower()
    slips = ("".join(s) for s in corruptions(list(inside), draws, 12, ALPHABET))
    wrong = [s for s in slips if s not in word.lower() and len(s) == size][:3]
    return Case(f'Which letters stand side by side in "{word.lower()}"?', inside, tuple(wrong))


def _common(word: str, draws: Draws, words: Sequence[str]) -> Case:
    """The longest letters that two words share, three or more; wrong are as many letters of one of
    them. No case where too few are wrong."""
    word = word.lower()
    for _ in range(200):
        other = words[draws.below(len(words))].lower()
        shared = _shared(word, other)
        if len(shared) >= 3 and word not in other and other not in word:
            break
    else:
        return Case("", "")  # no partner
    size = len(shared)
    own = [w[i : i + size] for w in (word, other) for i in range(len(w) - size + 1)]
    wrong = [part for part in draws.shuffled(sorted(set(own))) if not (part in word and part in other)]
    return Case(f'Which letters do "{word}" and "{other}" share?', shared, tuple(wrong[:3]))


def _shared(a: str, b: str) -> str:
    """The longest string that two words have in common, the first of them in `a`."""
    parts = (a[i : i + size] for size in range(min(len(a), len(b)), 0, -1) for i in range(len(a) - size + 1))
    return next((part for part in parts if part in b), "")


def _unscramble(word: str, draws: Draws, words: Sequence[str]) -> Case:
    letters = draws.shuffled(list(word.lower()))
    asked = f'Which word is made of the letters "{" ".join(letters)}"?'
    return _letters(asked, word.lower(), draws, ["".join(letters)])


CHARBENCH: dict[str, Callable[[str, Draws, Sequence[str]], Case]] = {
    "count_character_frequency": _count, "count_unique_chars": _unique,
    "find_first_occurrence": _first, "find_last_occurrence": _last,
}  # fmt: skip
PROBES: dict[str, Callable[[str, Draws, Sequence[str]], Case]] = {
    "nth_character": _nth, "nth_from_end": _nth_last, "upper_case": _case, "substring": _substring,
    "common_substring": _common, "unscramble": _unscramble,
}  # fmt: skip
CHANCE = {**dict.fromkeys(CHARBENCH, 1 / len(NUMBERS)), **dict.fromkeys(PROBES, 1 / 4)}


def _by_length(words: Sequence[str]) -> list[str]:
    """Words of every length in turn, as long as there are any, so that short samples hold all lengths alike."""
    each = [[word for word in words if len(word) == size] for size in range(4, 11)]
    return [word for row in itertools.zip_longest(*each) for word in row if word is not None]


def questions(words: Iterable[str], task: str, count: int, seed: int = 0) -> list[Question]:
    """`count` questions of a task (0: a question a word) about words of 4 to 10 letters. The words are dealt out among
    the tasks of their table, so that none serves two. Raises ConfigError where there are too few."""
    table, number = (
        (CHARBENCH, list(CHARBENCH).index(task)) if task in CHARBENCH else (PROBES, list(PROBES).index(task))
    )
    shuffled = Draws(seed, "words").shuffled(sorted({word for word in words if 4 <= len(word) <= 10}))
    mine = _by_length(shuffled[number :: len(table)])
    if len(mine) <= SHOTS:
        raise ConfigError(f"{task}: the text has {len(shuffled)} words of 4 to 10 letters a-z; "
                          f"{(SHOTS + 1) * len(table)} are needed: give it more text (--words FILE)")  # fmt: skip
    wanted = SHOTS + (count or len(mine))
    cases = (table[task](word, Draws(seed, task, word), shuffled) for word in mine)
    cases = list(itertools.islice((case for case in cases if len(case.wrong) >= 3), wanted))
    if len(cases) <= SHOTS:
        raise ConfigError(f"{task}: too few of the text's words allow it: give it more text (--words FILE)")
    return ask_in_words("", cases[:SHOTS], cases[SHOTS:][: count or None])
