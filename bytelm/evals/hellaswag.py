"""HellaSwag (Zellers et al. 2019), clean and under noise: sixteen tasks and a robustness score.

Texts are put together as lm-evaluation-harness does. Noise follows BLT and H-Net: five rules, each on the context, on
the endings, and on both; the same noised context stands before all four endings. The robustness score is H-Net's
(Hwang et al. 2025, appendix D.1): 100 (noised - 1/4) / (clean - 1/4).
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bytelm.config import ConfigError
from bytelm.data.noise import BLT_RULES, noised
from bytelm.evals.choices import Question

CHANCE = 1 / 4
FIELDS = ("context", "endings", "both")
TASKS = ("clean", *(f"{rule}_{field}" for rule in BLT_RULES for field in FIELDS))


@dataclass(frozen=True)
class Item:
    """One item of the validation set: a context, four endings, the right one."""

    name: str
    context: str
    endings: tuple[str, ...]
    answer: int


def _cleaned(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def item_of(record: Mapping, line: int) -> Item:
    """The item of a record in the published format; `line` names one without a number of its own."""
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    endings, answer = tuple(_cleaned(ending) for ending in record["endings"]), int(record["label"])
    if len(endings) != 4 or not 0 <= answer < 4:
        raise ValueError("four endings and a label 0 .. 3 are needed")
    return Item(str(record.get("ind", line)), _cleaned(context), endings, answer)


def read_hellaswag(path: Path) -> list[Item]:
    """Items of a JSONL file in the published format. Raises ConfigError naming the line that is not."""
    items = []
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for n, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                items.append(item_of(json.loads(line), n))
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise ConfigError(f"{path}: line {n} is no item of HellaSwag: {e!r}") from None
    if not items:
        raise ConfigError(f"{path}: holds no item of HellaSwag")
    return items


def hellaswag_questions(items: Sequence[Item], task: str, seed: int = 0) -> list[Question]:
    """The items under a task: clean, or RULE_FIELD."""
    rule, _, field = task.rpartition("_")

    def changed(item: Item, text: str, name: str) -> str:
        return noised(text.encode(), rule, seed=seed, document=item.name, field=name).decode()

    out = []
    for item in items:
        context, endings = item.context, item.endings
        if field in ("context", "both"):
            context = changed(item, context, "context")
        if field in ("endings", "both"):
            endings = tuple(changed(item, ending, f"ending{n}") for n, ending in enumerate(endings))
        out.append(Question(context.encode(), tuple(f" {e}".encode() for e in endings), item.answer, endings))
    return out


def robustness(clean: float, noisy: float, chance: float = CHANCE) -> float:
    """What is left of the accuracy above chance, in per cent; nan where a clean text gives none."""
    return 100 * (noisy - chance) / (clean - chance) if clean > chance else math.nan


def robustness_interval(
    clean: NDArray[np.bool_], noisy: NDArray[np.bool_], seed: int = 0, draws: int = 1000
) -> tuple[float, float]:
    """A 95 % bootstrap interval of the robustness score over items: clean [n], noisy [tasks, n]. Draws without an
    accuracy above chance count as 0, so that the interval of a model at chance is wide, not missing."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(clean), (draws, len(clean)))
    scores = [robustness(clean[p].mean(), noisy[:, p].mean()) for p in picks]
    low, high = np.percentile(np.nan_to_num(scores), (2.5, 97.5))
    return float(low), float(high)
