"""Tasks in the JSONL forms that llm-foundry's in-context learning files have (its `arc_easy`, `piqa`, `lambada_openai`,
`winograd_wsc`, `simple_arithmetic_*`, ...), from any local file:

    {"query", "choices": [...], "gold": n}                  which choice is the most probable one behind the query
    {"context_options": [...], "continuation", "gold": n}   behind which context the continuation is
    {"context", "continuation"}                             whether the continuation is what is written
"""

import json
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bytelm.config import ConfigError
from bytelm.protocol import ByteLM
from bytelm.windows import end_of

GROUP = 128  # records scored at once


@dataclass(frozen=True)
class Record:
    """Pairs (context, ending), and which is the right one; a single pair is to be written."""

    pairs: tuple[tuple[bytes, bytes], ...]
    gold: int


def read_records(path: Path) -> list[Record]:
    """The records of a file. Raises ConfigError naming the line that is none, or of another form than the first."""
    found: list[Record] = []
    with path.open("rb") as file:
        for n, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line.decode("utf-8-sig" if n == 1 else "utf-8"))
                found.append(_record(fields))
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
                raise ConfigError(f"{path}: line {n} is none of the forms {{query, choices, gold}}, {{context_options, "
                                  f"continuation, gold}}, {{context, continuation}}: {e!r}") from None  # fmt: skip
            if (len(found[-1].pairs) == 1) != (len(found[0].pairs) == 1):
                raise ConfigError(f"{path}: line {n} is of another form than the first")
    if not found:
        raise ConfigError(f"{path}: holds no record")
    return found


def _record(fields: dict[str, Any]) -> Record:
    if "choices" in fields:
        if not isinstance(fields["choices"], list):
            raise ValueError("choices must be a list")
        pairs = [(fields["query"], choice) for choice in fields["choices"]]
    elif "context_options" in fields:
        pairs = [(context, fields["continuation"]) for context in fields["context_options"]]
    else:
        if not fields["continuation"]:
            raise ValueError("an empty continuation")
        return Record((_joined(fields["context"], fields["continuation"]),), 0)
    gold = operator.index(fields["gold"])
    if len(pairs) < 2 or not 0 <= gold < len(pairs):
        raise ValueError("two choices or more are needed, and gold among them")
    return Record(tuple(_joined(*pair) for pair in pairs), gold)


def _joined(context: str, ending: str) -> tuple[bytes, bytes]:
    """With a space between them where neither has white space there."""
    apart = not context or context[-1:].isspace() or ending[:1].isspace()
    return context.encode(), (ending if apart else f" {ending}").encode()


def records_unit(lm: ByteLM, records: Sequence[Record]) -> tuple[dict[str, float], dict[str, Any]]:
    """Of choices the accuracy by their sum and over their bytes; of continuations their bits per byte and the share
    that greedy decoding writes."""
    totals: list[list[float]] = []
    written: list[bool] = []
    for begin in range(0, len(records), GROUP):
        part = records[begin : begin + GROUP]
        pairs = [pair for record in part for pair in record.pairs]
        scores = lm.score_batch([ending for _, ending in pairs], [context for context, _ in pairs])
        if np.isnan([score.total for score in scores]).any():
            raise FloatingPointError("the model's scores are not numbers (nan)")
        each = iter(zip(pairs, scores))
        for record in part:
            mine = [next(each) for _ in record.pairs]
            totals.append([score.total for _, score in mine])
            if len(mine) == 1:
                ((context, ending), score) = mine[0]
                written.append(_writes(lm, context, ending) if score.greedy is None else bool(score.greedy.all()))
    if written:
        size = sum(len(r.pairs[0][1]) for r in records)
        nats = -sum(total for (total,) in totals)
        return ({"accuracy": float(np.mean(written)), "bpb": nats / size / math.log(2), "items": float(len(records))},
                {"gain": "".join(map(str, map(int, written)))})  # fmt: skip
    right = {"gain": [], "bytes": []}
    for record, row in zip(records, totals):
        sizes = [max(len(ending), 1) for _, ending in record.pairs]
        for by, values in (("gain", row), ("bytes", np.array(row) / sizes)):
            best = int(np.argmax(values))
            right[by].append(best == record.gold and math.isfinite(values[best]))
    metrics = {"accuracy": float(np.mean(right["gain"])), "accuracy_bytes": float(np.mean(right["bytes"])),
               "chance": float(np.mean([1 / len(r.pairs) for r in records])), "items": float(len(records))}  # fmt: skip
    return metrics, {by: "".join(map(str, map(int, flags))) for by, flags in right.items()}


def _writes(lm: ByteLM, context: bytes, ending: bytes) -> bool:
    """Whether greedy decoding behind a context, or the end of it that fits, writes an ending."""
    return lm.generate(end_of(context, lm.window - len(ending)), len(ending), temperature=0) == ending
