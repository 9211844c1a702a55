"""What a person sees while a run goes on: one live line on a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text


def clock(seconds: float) -> str:
    """75 -> 1:15, 4000 -> 1:06:40."""
    minutes, seconds = divmod(max(int(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def amount(count: float) -> str:
    """1536 -> 1.54 kB, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def _chunks(record: dict[str, float]) -> str:
    """Bytes per chunk of each level, and boundaries that found no slot."""
    spans = [record[name] for level in range(9) if (name := f"level{level}/bytes_per_chunk") in record]
    if "bytes_per_token" in record:
        return f"{record['bytes_per_token']:.1f} bytes/token · "
    if not spans:
        return ""
    dropped = sum(value for name, value in record.items() if name.endswith("/dropped"))
    lost = f", {dropped:.0f} dropped" if dropped else ""
    return f"{' / '.join(f'{span:.1f}' for span in spans)} bytes/chunk{lost} · "


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Whoever read our output is gone (| head): the run goes on without a word."""
        self.quiet = True


class Progress:
    """Prints a run's progress: step, bytes seen, bits per byte (training and held-out), bytes/s, time left."""

    def __init__(self, steps: int, console: Console | None = None, every_seconds: float = 10.0, *, quiet: bool = False):
        """`quiet`: print nothing (of several processes one speaks)."""
        self.steps = steps
        self.console = console or _Console(stderr=True, highlight=False, quiet=quiet)
        self._live = (
            Live(console=self.console, refresh_per_second=4, transient=True) if self.console.is_terminal else None
        )
        self._every, self._last_print = every_seconds, 0.0
        self._heldout: float | None = None

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live:
            self._live.stop()

    def note(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    def update(self, step: int, seen: int, record: dict[str, float]) -> None:
        """A training measurement: `bpb`; `bytes_per_second` and `seconds_left`, where known; of a model that chunks
        `levelN/bytes_per_chunk` and `levelN/dropped`."""
        bpb, rate, left = record["bpb"], record.get("bytes_per_second"), record.get("seconds_left")
        held = "  -  " if self._heldout is None else f"{self._heldout:.3f}"
        share = step / self.steps
        width = 20 if self.console.width >= 120 else 0
        bar = "━" * round(width * share) + "╌" * (width - round(width * share)) + " " * bool(width)
        pace = "compiled" if rate is None or left is None else f"{amount(rate)}/s · {clock(left)} left"
        line = (
            f"step {step:>{len(str(self.steps))}}/{self.steps} {bar}{amount(seen):>8} seen · "
            f"train {bpb:.3f} · held-out {held} bits/byte · {_chunks(record)}{pace}"
        )
        if self._live:
            self._live.update(Text(line))
        elif time.monotonic() - self._last_print >= self._every:
            self._last_print = time.monotonic()
            self.note(line)

    def heldout(self, step: int, seen: int, result: Any) -> None:
        """A held-out measurement: its `bpb`, `bytes`, and what there is `more`."""
        self._heldout = result.bpb
        done = f"step {step:>{len(str(self.steps))}}/{self.steps} · {amount(seen):>8} seen"
        self.note(f"{done} · held-out {result.bpb:.4f} bits/byte over {amount(result.bytes)}{_targets(result.more())}")


def _targets(more: dict[str, float]) -> str:
    """What a held-out measurement of an encoder-decoder says besides."""
    if "heldout_sequence_accuracy" not in more:
        return ""
    soft = f" · soft {more['heldout_soft_bpb']:.4f}" if "heldout_soft_bpb" in more else ""
    return (
        f" · whole targets right {more['heldout_sequence_accuracy']:.1%} · deleted {more['heldout_deleted']:.1%}{soft}"
    )
