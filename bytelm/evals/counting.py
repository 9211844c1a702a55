"""Counting letters and adding numbers, each in several spellings: what differs between the spellings of one question is
what a model's units do to it.

Counting follows "Counting Ability of Large Language Models and Impact of Tokenization" (Zhang et al. 2024), sums
"Tokenization counts" (Singh & Strouse 2024).
"""

from bytelm.data.noise import ALPHABET, Draws
from bytelm.evals.choices import Question, corruptions
from bytelm.evals.prompts import Case, ask_in_words

LENGTHS = ((10, 20), (20, 30), (30, 40))  # letters of a string, the last not included
SPELLINGS = {
    "plain": lambda s: s,
    "spaced": " ".join,
    "commas": ", ".join,
    "quoted": lambda s: ", ".join(f"'{c}'" for c in s),
}
FORMATS = ("plain", "comma_right", "comma_left", "space_right", "space_left")
CHANCE = 1 / 4


def count_questions(spelling: str, count: int, seed: int = 0) -> list[Question]:
    """How often a letter is in a random string of two letters; the strings and letters are the same under every
    spelling. The choices are four numbers in a row."""
    cases = []
    for n in range(count + 2):
        low, high = LENGTHS[n % len(LENGTHS)]
        draws = Draws(seed, "count", n)
        a, b = draws.shuffled(list(ALPHABET))[:2]
        string = "".join((a, b)[draws.below(2)] for _ in range(low + draws.below(high - low)))
        right = string.count(a)
        lowest = max(right - draws.below(4), 0)  # of four numbers in a row, any may be the right one
        wrong = tuple(str(k) for k in range(lowest, lowest + 4) if k != right)
        cases.append(Case(f'How many "{a}" are in {SPELLINGS[spelling](string)}?', str(right), wrong))
    return ask_in_words("", cases[:2], cases[2:])


def spelt(number: int, form: str) -> str:
    """A number with a comma or space every three digits, counted from its right or left end."""
    digits = str(number)
    if form == "plain":
        return digits
    mark, side = ("," if form.startswith("comma") else " "), form.split("_")[1]
    if side == "right":
        return f"{number:,}".replace(",", mark)
    return mark.join(digits[i : i + 3] for i in range(0, len(digits), 3))


def sum_questions(
    form: str, count: int, seed: int = 0, shots: int = 4, digits: tuple[int, int] = (7, 10)
) -> list[Question]:
    """Sums of two numbers of 7 to 10 digits (all pairs of lengths in turn) behind worked ones of the same lengths; the
    numbers are the same under every form. The wrong answers have one slip."""
    sizes = range(digits[0], digits[1] + 1)
    pairs = [(a, b) for a in sizes for b in sizes]

    def drawn(draws: Draws, size: int) -> int:
        low = 10 ** (size - 1)
        return low + draws.below(9 * low)

    questions = []
    for n in range(count):
        draws, (left, right) = Draws(seed, "sum", n), pairs[n % len(pairs)]
        lines = []
        for _ in range(shots + 1):
            a, b = drawn(draws, left), drawn(draws, right)
            lines.append((f"{spelt(a, form)} + {spelt(b, form)} =", a + b))
        (asked, total) = lines.pop()
        context = "".join(f"{line} {spelt(value, form)}\n" for line, value in lines) + asked
        slips = corruptions(str(total), draws, 30, "0123456789")
        wrong = [int("".join(slip)) for slip in slips if slip[0] != "0"][:3]
        answers = [spelt(value, form) for value in wrong]
        answers.insert(n % 4, spelt(total, form))
        endings = tuple(f" {answer}\n".encode() for answer in answers)
        neutral = context[: -len(asked)] + "="
        questions.append(Question(context.encode(), endings, n % 4, tuple(answers), neutral.encode()))
    return questions
