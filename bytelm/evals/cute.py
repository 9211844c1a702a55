"""CUTE (Edman et al., EMNLP 2024): does a model know how words are spelt, and can it act on letters and words?

The data are the authors' TSV files (MIT), which the user has in a folder; the prompts are our own. Tasks with two
possible answers are asked as choices between them (chance 50 %); the others between the right answer and three wrong
ones (25 %): the text the task acts on, unchanged, where that is wrong, and answers with one slip. Or the answer is
written out, as in the paper.
"""

import csv
from pathlib import Path

from bytelm.config import ConfigError
from bytelm.data.noise import ALPHABET, Draws
from bytelm.evals.choices import Question, corruptions
from bytelm.evals.prompts import SHOTS, Case, ask_in_words

# task -> (instruction, question)
TASKS = {
    "spell": ("Spell the word: its letters, with a space between them.", 'Spell "{0}".'),
    "spell_inverse": ("Write the word that is spelt out.", 'Which word is spelt "{0}"?'),
    "contains_char": ("Say whether the word has the letter: Yes or No.", 'Is there a "{0}" in "{1}"?'),
    "contains_word": ("Say whether the sentence has the word: Yes or No.", 'Is there "{0}" in "{1}"?'),
    "orth": ("Choose the word that is spelt more like the given one.",
             'Which is spelt more like "{0}": "{1}" or "{2}"?'),
    "sem": ("Choose the word that means nearly the same as the given one.",
            'Which means more nearly the same as "{0}": "{1}" or "{2}"?'),
    "ins_char": ("Add a letter behind each letter of one kind.", 'Add "{0}" behind each "{1}" in "{2}".'),
    "ins_word": ("Add a word behind each word of one kind.", 'Add "{0}" behind each "{1}" in "{2}".'),
    "del_char": ("Leave out each letter of one kind.", 'Leave each "{0}" out of "{1}".'),
    "del_word": ("Leave out each word of one kind.", 'Leave each "{0}" out of "{1}".'),
    "sub_char": ("Put one letter in the place of another.", 'Put "{1}" in the place of each "{0}" in "{2}".'),
    "sub_word": ("Put one word in the place of another.", 'Put "{1}" in the place of each "{0}" in "{2}".'),
    "swap_char": ("Let two letters change places.", 'Let "{0}" and "{1}" change places in "{2}".'),
    "swap_word": ("Let two words change places.", 'Let "{0}" and "{1}" change places in "{2}".'),
}  # fmt: skip
RANDOM = tuple(f"{task}_rand" for task in (
    "spell", "spell_inverse", "contains_char", "ins_char", "del_char", "sub_char", "swap_char"
))  # fmt: skip
TWO = ("contains_char", "contains_word", "orth", "sem")


def chance(task: str) -> float:
    """What guessing among the choices of a task gives."""
    return 1 / 2 if task.removesuffix("_rand") in TWO else 1 / 4


def read_cute(folder: Path, task: str) -> list[list[str]]:
    """Rows of a task: its inputs and the answer. Raises ConfigError naming the file where it is missing or other."""
    path = folder / f"{task}.tsv"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; the folder holds CUTE's data/*.tsv (github.com/Leukas/CUTE)")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: is no UTF-8 text ({e.reason} at byte {e.start})") from None
    wanted = TASKS[task.removesuffix("_rand")][1].count("{") + 1
    if not rows or rows[0][-1] != "label" or any(len(row) != wanted for row in rows):
        raise ConfigError(f"{path}: expected {wanted} columns, the last named label")
    return rows[1:]


def questions(folder: Path, task: str, count: int, seed: int = 0) -> list[Question]:
    """`count` questions of a task (0: all), drawn by the seed; the four worked examples are not among them."""
    kind = task.removesuffix("_rand")
    instruction, question = TASKS[kind]
    rows = Draws(seed, task).shuffled(read_cute(folder, task))
    shots = _shots(rows, kind)
    rest = [row for row in rows if row not in shots][: count or None]
    cases = [Case(question.format(*row), row[-1], _wrong(kind, row, Draws(seed, task, *row))) for row in rest]
    return ask_in_words(instruction, [Case(question.format(*row), row[-1]) for row in shots], cases)


def _shots(rows: list[list[str]], kind: str) -> list[list[str]]:
    """The first rows; where the answer is yes or no, both alternate."""
    if not kind.startswith("contains"):
        return rows[:SHOTS]
    by_answer = [[row for row in rows if row[-1] == answer] for answer in ("Yes", "No")]
    return [row for pair in zip(*by_answer) for row in pair][:SHOTS]


def _wrong(kind: str, row: list[str], draws: Draws) -> tuple[str, ...]:
    answer = row[-1]
    if kind in TWO:
        both = ("Yes", "No") if kind.startswith("contains") else row[1:3]
        return tuple(other for other in both if other != answer)
    unchanged = [row[-2]] if row[-2] != answer and kind not in ("spell", "spell_inverse") else []
    between = " " if kind.endswith("word") or kind == "spell" else ""
    units = answer.split(" ") if between else list(answer)
    alphabet = row[-2].split() if kind.endswith("word") else ALPHABET
    try:
        slips = [between.join(wrong) for wrong in corruptions(units, draws, 4 - len(unchanged), alphabet)]
    except ValueError as e:
        raise ConfigError(f"CUTE, {kind}, row {row}: {e}") from None
    return tuple(unchanged + [slip for slip in slips if slip not in unchanged])[:3]
