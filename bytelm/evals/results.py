"""Results of evaluations as lines of JSON, one a model and task, so that a run that was stopped goes on there."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bytelm.config import ConfigError


@dataclass(frozen=True)
class Result:
    """What one model scored on one task. `key` stands for all that decides it: model, task, data, settings."""

    key: str
    model: str
    suite: str
    task: str
    metrics: Mapping[str, float | None]
    details: Mapping[str, Any] = field(default_factory=dict)  # by item, for intervals and plots
    set: str = ""  # stands for all that its suite asked beside it: results of one set can be held against each other


def key_of(**decides: Any) -> str:
    """A short name for everything that decides a result."""
    text = json.dumps(decides, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Results:
    """The results in a folder. A last line that a crash cut off is left out, and written over. Raises ConfigError for a
    file with other lines than ours, and leaves it as it is."""

    def __init__(self, folder: Path):
        self.path = folder / "results.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ConfigError(f"{folder}: is a file; --out names a folder") from None
        self.found: dict[str, Result] = {}
        self._lines: list[Result] = []
        self._whole = self._torn = 0  # bytes of whole lines; size of the file, where a line behind them is torn
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        for n, line in enumerate(lines, 1):
            try:
                result = Result(**json.loads(line))
                result = dataclasses.replace(result, metrics=_back(result.metrics))
                self.found[result.key] = result
            except (ValueError, TypeError, AttributeError):
                if not line.endswith(b"\n"):
                    self._torn = self._whole + len(line)
                    break
                raise ConfigError(f"{self.path}: line {n} is no result of this version of bytelm: move the file away, "
                                  "or name another folder") from None  # fmt: skip
            self._whole += len(line)
            self._lines.append(result)
        self._open = bool(lines) and not self._torn and not lines[-1].endswith(b"\n")  # the last line has no end

    def add(self, result: Result) -> None:
        """Adds a result and writes it now."""
        metrics = {k: v if v is None or math.isfinite(v) else None for k, v in result.metrics.items()}
        line = json.dumps({**result.__dict__, "metrics": metrics}, ensure_ascii=False) + "\n"
        with self.path.open("ab") as file:
            if self._torn and file.tell() == self._torn:
                file.truncate(self._whole)
            elif self._open:
                file.write(b"\n")
            file.write(line.encode("utf-8", "backslashreplace"))
        self._torn, self._open = 0, False
        self.found[result.key] = result
        self._lines.append(result)

    def latest(self, sets: Mapping[str, str], names: Set[str] = frozenset()) -> list[Result]:
        """The last result of each model and task, in the order of the file: of each suite the set named, or the last in
        the file; of all models, or of some, by name."""
        sets = {r.suite: r.set for r in self._lines} | dict(sets)
        last = {(r.model, r.suite, r.task): r for r in self._lines if r.set == sets[r.suite]}
        return [r for r in last.values() if not names or names & {r.model, r.model.rpartition(" (")[0]}]


def _back(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Numbers as they were: JSON has no nan."""
    return {name: math.nan if value is None else float(value) for name, value in metrics.items()}
