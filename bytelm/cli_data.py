"""The command that makes corpora: prepare. Returns an exit status."""

import sys
import time
from pathlib import Path
from typing import Annotated

import tyro
from rich import progress as rich_progress
from rich.console import Console

from bytelm.data.prepare import ERRORS, Progress, prepare
from bytelm.data.units import PrepareOptions

EXIT_OK, EXIT_INTERRUPTED = 0, 75


def prepare_command(args: list[str]) -> int:
    def parse(
        out: tyro.conf.Positional[Path],
        inputs: tyro.conf.Positional[tuple[str, ...]],
        options: Annotated[PrepareOptions, tyro.conf.arg(name="")],
    ) -> tuple[Path, tuple[str, ...], PrepareOptions]:
        """Turns text into a corpus of sharded ArrayRecord files that training reads with random access.

        A run that was stopped goes on when the same command is given again.

        Args:
            out: folder to make
            inputs: files or globs: text, .jsonl, .parquet, .array_record; text and jsonl also as .gz .zst .xz .bz2
            options: how
        """
        return out, inputs, options

    out, inputs, options = tyro.cli(parse, args=args, prog="bytelm prepare")
    with _Show() as show:
        try:
            manifest = prepare(out, inputs, options, show)
        except KeyboardInterrupt:
            print(f"\nstopped; the same command goes on from here ({out})", file=sys.stderr)
            return EXIT_INTERRUPTED
    for name, split in manifest["splits"].items():
        print(
            f"{name:<6}{split['documents']:>14,} documents {split['bytes']:>18,} bytes {len(split['shards']):>6} shards"
        )
    left_out = [f"{manifest[name]:,} {name}" for name in ("duplicates", "empty", "unreadable") if manifest[name]]
    if left_out:
        print("left out: " + ", ".join(left_out) + (f" (see {out / ERRORS})" if manifest["unreadable"] else ""))
    print(f"train on it:  bytelm train CONFIG.yaml --data.train {out}")
    return EXIT_OK


class _Show:
    """A bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, every_seconds: float = 10.0):
        self._console = Console(stderr=True, highlight=False)
        columns = ("{task.description}", rich_progress.BarColumn(), rich_progress.DownloadColumn(),
                   rich_progress.TransferSpeedColumn(), rich_progress.TimeRemainingColumn(),
                   "{task.fields[said]}")  # fmt: skip
        self._bar = rich_progress.Progress(*columns, console=self._console, transient=True)
        self._tasks: dict[str, rich_progress.TaskID] = {}
        self._every, self._last = every_seconds, time.monotonic()

    def __enter__(self) -> "_Show":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def __call__(self, now: Progress) -> None:
        said = f"{now.documents:,} documents" + (f", {now.unreadable:,} unreadable" if now.unreadable else "")
        if self._console.is_terminal:
            if now.phase not in self._tasks:
                self._tasks[now.phase] = self._bar.add_task(now.phase, total=now.total, said=said)
            self._bar.update(self._tasks[now.phase], completed=now.done, said=said)
        elif time.monotonic() - self._last >= self._every or now.done == now.total:
            self._last = time.monotonic()
            self._console.print(
                f"{now.phase} {now.done / 1e6:,.1f} of {now.total / 1e6:,.1f} MB · {said}", markup=False
            )
