"""Questions in words, behind a few worked examples; the answer stands in quotation marks, so that it can be told where
it ends."""

from collections.abc import Sequence
from dataclasses import dataclass

from bytelm.evals.choices import Question

SHOTS = 4


@dataclass(frozen=True)
class Case:
    """One case of a task: what is asked, the answer, and wrong answers (none: the task is for writing only)."""

    asked: str
    answer: str
    wrong: tuple[str, ...] = ()


def ask_in_words(instruction: str, shots: Sequence[Case], cases: Sequence[Case]) -> list[Question]:
    """Questions of one task: the instruction, the shots worked out and numbered, the case. The right ending stands at
    a place that differs from case to case, so that a model which prefers the first of equals gains nothing."""
    opening = instruction + "\n\n" if instruction else ""
    opening += "".join(f'{n}. {shot.asked}\nAnswer: "{shot.answer}"\n\n' for n, shot in enumerate(shots, 1))
    questions = []
    for n, case in enumerate(cases):
        answers = list(case.wrong)
        place = n % (len(answers) + 1)
        answers.insert(place, case.answer)
        context = f'{opening}Question: {case.asked}\nAnswer: "'
        neutral = f'{opening}Question: ?\nAnswer: "'
        endings = tuple(f'{a}"'.encode() for a in answers)
        questions.append(Question(context.encode(), endings, place, tuple(answers), neutral.encode()))
    return questions
