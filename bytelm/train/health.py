"""Looks at every step for a loss or gradient that is not a finite number, one step late so that no device waits."""

import math
from collections.abc import Callable
from typing import Any

import jax

from bytelm.data.pipeline import Batch
from bytelm.parallel.hosts import gather

SHOWN = 8  # stretches of text named in a message


class Diverged(Exception):
    """Loss or gradient was not finite for too many batches in a row (exit status 3)."""


class Health:
    """Counts skipped batches: reports each with the text it was made of, and ends the run after `limit` in a row."""

    def __init__(self, limit: int, where: Callable[[Batch], list[str]], report: Callable[[dict], None],
                 last_good: Callable[[int], str], seen: int = 0):  # fmt: skip
        """`where` names the text of a batch, `report` takes the record of a skipped one, `last_good` says what is
        kept given the first step of the bad streak, `seen` is what was read before."""
        self.limit, self.where, self.report, self.last_good = limit, where, report, last_good
        self.seen = seen  # bytes of text up to the last step looked at
        self.in_row = 0  # skipped batches up to the last step looked at
        self.wishes = (False, False)  # of all processes, at the last step looked at
        self.looked_at = 0  # that step
        self._waiting: list[tuple[int, Any, Batch]] = []

    def after(self, step: int, metrics: Any, batch: Batch) -> None:
        """Takes in a step that was just sent off, and looks at the one before it. Raises Diverged."""
        self._waiting.append((step, metrics, batch))
        self._look(keep=1)

    def settle(self, last: bool = False) -> None:
        """Looks at every step taken in so far. Raises Diverged; at the last step of a run after two bad ones in a row,
        which are no accident of one batch."""
        if last:
            self.limit = min(self.limit, 2)
        self._look(keep=0)

    def _look(self, keep: int) -> None:
        while len(self._waiting) > keep:
            step, metrics, batch = self._waiting.pop(0)
            few = {name: metrics[name] for name in ("skipped_in_row", "read", "wishes") if name in metrics}
            got = jax.device_get(few)
            self.looked_at = step
            if "wishes" in got:
                self.wishes = (bool(got["wishes"][0]), bool(got["wishes"][1]))
            self.seen += int(got["read"])
            self.in_row = int(got["skipped_in_row"])
            if self.in_row:
                text = sorted({name for names in gather(self.where(batch)) for name in names})
                self._skipped(step, {name: float(metrics[name]) for name in ("nll", "grad_norm")}, text)

    def _skipped(self, step: int, numbers: dict[str, float], text: list[str]) -> None:
        loss, norm = numbers["nll"], numbers["grad_norm"]
        shown = ", ".join(text[:SHOWN]) + (f" and {len(text) - SHOWN} more" if len(text) > SHOWN else "")
        self.report({"step": step, "event": "skipped", "loss": str(loss), "grad_norm": str(norm),
                     "in_row": self.in_row, "text": text})  # fmt: skip
        if self.in_row >= self.limit:
            kept = self.last_good(step - self.in_row + 1)
            raise Diverged(
                f"step {step}: loss {loss}, gradient norm {norm}, {self.in_row} batches in a row (train.max_skipped): "
                f"training has diverged; {kept}. The last batch was made of {shown}. Lower optim.lr, lengthen "
                "optim.warmup_steps or lower optim.clip_norm; if one text is to blame, take it out."
            )


def with_bits(metrics: dict[str, float]) -> dict[str, float]:
    """A step's metrics with bits per byte added (of an encoder-decoder per target id)."""
    return {"bpb": metrics["nll"] / math.log(2) / metrics.get("bytes_per_token", 1.0), **metrics}
