"""Results of evaluations as lines of JSON, one a model and task, so that a run that was stopped goes on there."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
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


def key_of(**decides: Any) -> str:
    """A short name for everything that decides a result."""
    text = json.dumps(decides, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Results:
    """The results in a folder. Lines that a crash cut off are left out and written anew."""

    def __init__(self, folder: Path):
        self.path = folder / "results.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ConfigError(f"{folder}: is a file; --out names a folder") from None
        self.found: dict[str, Result] = {}
        whole = b""
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else ():
            try:
                result = Result(**json.loads(line))
                result = dataclasses.replace(result, metrics=_back(result.metrics))
            except (ValueError, TypeError, AttributeError):
                continue
            if line.endswith(b"\n"):
                self.found[result.key] = result
                whole += line
        if self.path.exists() and whole != self.path.read_bytes():
            temporary = self.path.with_suffix(".tmp")
            temporary.write_bytes(whole)
            temporary.replace(self.path)

    def add(self, result: Result) -> None:
        """Adds a result and writes it now."""
        metrics = {k: v if v is None or math.isfinite(v) else None for k, v in result.metrics.items()}
        line = json.dumps({**result.__dict__, "metrics": metrics}, ensure_ascii=False) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
        self.found[result.key] = result


def _back(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Numbers as they were: JSON has no nan."""
    return {name: math.nan if value is None else float(value) for name, value in metrics.items()}
