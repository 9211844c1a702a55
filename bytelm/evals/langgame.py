"""The two small tasks of StochasTok (Sims et al. 2025) that a model is trained for and then tested on: questions about
the letters of words, and sums written backwards. Both can be drawn without end, for training and for testing.
"""

import itertools
from collections.abc import Iterator, Sequence

from bytelm.config import ConfigError
from bytelm.data.noise import ALPHABET, Draws
from bytelm.evals.choices import Question, corruptions

_OPENINGS = ("Which word", "Which of these words", "Which option", "Which choice")
KINDS = ("most", "contains", "starts", "ends", "longest", "shortest")


def _most(words: Sequence[str], draws: Draws, kind: str) -> tuple[str, list[str], list[str]]:
    letter = ALPHABET[draws.below(26)]
    asked = ("has the most", "holds the most", "has the highest number of")[draws.below(3)]
    right = [w for w in words if w.count(letter) >= 2]
    return f"{asked} letter '{letter}'s", right, [w for w in words if w.count(letter) <= 1]


def _holds(words: Sequence[str], draws: Draws, kind: str) -> tuple[str, list[str], list[str]]:
    word = words[draws.below(len(words))]
    size = min(1 + draws.below(3), len(word))
    if kind == "contains":
        first = draws.below(len(word) - size + 1)
        part, asked = word[first : first + size], ("contains", "has in it", "holds")[draws.below(3)]
        return f"{asked} '{part}'", [word], [w for w in words if part not in w]
    if kind == "starts":
        part, asked = word[:size], ("starts with", "begins with", "has the beginning")[draws.below(3)]
        return f"{asked} '{part}'", [word], [w for w in words if not w.startswith(part)]
    part, asked = word[-size:], ("ends with", "ends in", "has the ending")[draws.below(3)]
    return f"{asked} '{part}'", [word], [w for w in words if not w.endswith(part)]


def _length(words: Sequence[str], draws: Draws, kind: str) -> tuple[str, list[str], list[str]]:
    if kind == "longest":
        asked = ("is the longest", "has the most letters", "is longest")[draws.below(3)]
        return asked, [w for w in words if len(w) >= 7], [w for w in words if len(w) <= 4]
    asked = ("is the shortest", "has the fewest letters", "is shortest")[draws.below(3)]
    return asked, [w for w in words if len(w) <= 3], [w for w in words if len(w) >= 6]


def language_questions(words: Sequence[str], kind: str = "", seed: int = 0) -> Iterator[Question]:
    """Questions of one kind (none: of all, at random) with four options among `words`. Raises ConfigError where the
    words have too few right or wrong answers for a kind."""
    if not words:
        raise ConfigError("langgame: no words to ask for: give it text with words of letters a-z (--words FILE)")
    draws = Draws(seed, "langgame", kind)
    misses = 0
    while True:
        which = kind or KINDS[draws.below(len(KINDS))]
        make = {"most": _most, "longest": _length, "shortest": _length}.get(which, _holds)
        asked, right, wrong = make(words, draws, which)
        if not right or len(wrong) < 3:  # a letter that no word has twice
            misses += 1
            if misses > 1000:
                raise ConfigError(f"LangGame's {which}: {len(words)} words are too few or too much alike")
            continue
        misses = 0
        answer = right[draws.below(len(right))]
        options = [answer]
        while len(options) < 4:
            other = wrong[draws.below(len(wrong))]
            if other not in options or len(set(wrong)) < 3:
                options.append(other)
        place = draws.below(4)
        options[0], options[place] = options[place], options[0]
        context = f"{_OPENINGS[draws.below(len(_OPENINGS))]} {asked}? The options are: {', '.join(options)}. Answer:"
        yield Question(context.encode(), tuple(f" {o}".encode() for o in options), place, tuple(options),
                       b"The options are of words. Answer:")  # fmt: skip


def sums(seed: int = 0, digits: int = 3) -> Iterator[tuple[str, str]]:
    """Sums of two numbers of so many digits, as ("$a+b=", the result backwards and "$")."""
    draws, low = Draws(seed, "sums", digits), 10 ** (digits - 1)
    while True:
        a, b = low + draws.below(9 * low), low + draws.below(9 * low)
        yield f"${a}+{b}=", f"{str(a + b)[::-1]}$"


def sum_questions(count: int, seed: int = 0) -> list[Question]:
    """The same sums as questions: the result backwards, or with one slip."""
    found = []
    for n, (asked, answer) in enumerate(itertools.islice(sums(seed), count)):
        wrong = corruptions(list(answer[:-1]), Draws(seed, "wrong sums", n), 3, "0123456789")
        endings = [f"{''.join(digits)}$" for digits in wrong]
        endings.insert(n % 4, answer)
        found.append(Question(asked.encode(), tuple(map(str.encode, endings)), n % 4, tuple(endings), b"$+="))
    return found
