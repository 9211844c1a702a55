"""How a run cut one text as it learned: kept in chunks.jsonl, shown in report.html."""

import json
from pathlib import Path

import numpy as np

from bytelm.boundaries import Boundaries
from bytelm.evals.chunk_page import Snapshot, chunk_page


class ChunkHistory:
    """The boundaries of a watched text at some steps of a run. An empty text is not watched."""

    def __init__(self, run_dir: Path, resume_step: int, text: bytes, writes: bool = True):
        """Takes up the records of a run that goes on, up to the step where it resumes and of this text. `writes`: of
        several processes one writes the file."""
        self.writes = writes
        self.text, self.path = text, run_dir / "chunks.jsonl"
        self._records: list[dict] = []
        if text and self.path.exists():
            self._records = [r for r in _read(self.path) if r["step"] <= resume_step and r["text"] == text.hex()]

    def has(self, step: int) -> bool:
        return any(r["step"] == step for r in self._records)

    def add(self, step: int, levels: list[Boundaries]) -> None:
        """Adds the boundaries at a step and writes the file anew (it stays small)."""
        self._records.append({
            "step": step, "text": self.text.hex(),
            "levels": [[lv.offset.tolist(), np.round(lv.probability, 4).tolist(), lv.cut.tolist()] for lv in levels],
        })  # fmt: skip
        if not self.writes:
            return
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in self._records), encoding="utf-8")
        temporary.replace(self.path)

    def write_report(self, target: Path, title: str, picture: Path) -> None:
        """Writes the page of all steps, if anything was watched."""
        if not self._records:
            return
        shots = [
            Snapshot(
                f"step {r['step']:,}",
                [Boundaries(np.array(o, np.int64), np.array(p), np.array(c, bool)) for o, p, c in r["levels"]],
            )
            for r in sorted(self._records, key=lambda r: r["step"])
        ]
        target.write_text(chunk_page(self.text, shots, title, picture), encoding="utf-8")


def _read(path: Path) -> list[dict]:
    """Records of the file; a damaged one is left out, as it only costs a picture."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            records.append({key: record[key] for key in ("step", "text", "levels")})
        except (ValueError, KeyError, TypeError):
            continue
    return records
