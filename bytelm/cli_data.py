"""The commands that make corpora and look at them: prepare, patches. Each returns an exit status."""

import json as json_text
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich import progress as rich_progress
from rich.console import Console

from bytelm.config import ConfigError, EntropyConfig
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


def patches_command(args: list[str]) -> int:
    def parse(
        model: tyro.conf.Positional[str],
        text: tyro.conf.Positional[tuple[str, ...]],
        size: float = 4.5,
        rule: Literal["threshold", "rise", "both"] = "threshold",
        rise: float = 0.0,
        max_patch: int = 0,
        max_bytes: int = 1_000_000,
        json: bool = False,
    ) -> dict[str, Any]:
        """Finds the entropy from which on a byte begins a patch, so that patches have the size asked for.

        The model is a flat one with attention windows, trained by `bytelm train` (configs/entropy_tiny.yaml); the text
        should be like what the patches are for.

        Args:
            model: run or weights directory of the entropy model
            text: files or globs, as data.train
            size: bytes of a patch, on average
            rule: threshold: the entropy is high; rise: it is higher than one byte before; both
            rise: rule both: by how many nats more
            max_patch: longer patches are cut at so many bytes; 0 = never
            max_bytes: how much of the text to look at
            json: print a JSON object
        """
        return dict(model=model, text=text, size=size, max_bytes=max_bytes, json=json,
                    rule=EntropyConfig(rule=rule, rise=rise, max_patch=max_patch))  # fmt: skip

    given = tyro.cli(parse, args=args, prog="bytelm patches")
    if not 1 < given["size"] < 1e6:
        raise ConfigError(f"--size {given['size']:g}: must be above 1 byte")
    if given["max_bytes"] < 1000:
        raise ConfigError(f"--max-bytes {given['max_bytes']}: at least 1,000, to say something of patches")
    if not Path(given["model"]).exists():
        raise ConfigError(f"{given['model']}: no such file or directory")
    from bytelm.data.sources import open_corpus
    from bytelm.train.patches import choose, first_entropies, load_patcher, patch_lengths

    rule, params = load_patcher(given["model"], given["rule"])
    corpus = open_corpus(tuple(given["text"]), text_field="text", cache_dir="")
    found = first_entropies(corpus, rule, params, given["max_bytes"])
    rule = choose(rule, given["size"], found)
    lengths = patch_lengths(rule, found)
    record = {
        "rule": rule.rule, "threshold": rule.threshold, "rise": rule.rise, "bytes": int(lengths.sum()),
        "bytes_per_patch": float(lengths.mean()), "median": float(np.median(lengths)),
        "p99": float(np.quantile(lengths, 0.99)), "longest": int(lengths.max()),
    }  # fmt: skip
    if given["json"]:
        print(json_text.dumps(record))
        return EXIT_OK
    high, rises = f"above {rule.threshold:g}", f"up by more than {rule.rise:g}"
    said = {"threshold": high, "rise": rises, "both": f"{high} and {rises}"}[rule.rule]
    print(
        f"entropy {said} nats: {record['bytes_per_patch']:.2f} bytes a patch (median {record['median']:.0f}, "
        f"99 % up to {record['p99']:.0f}, longest {record['longest']}) in {record['bytes']:,} bytes"
    )
    flags = {"rule": rule.rule, "threshold": rule.threshold, "rise": rule.rise, "max-patch": rule.max_patch}
    usual = EntropyConfig()
    more = [
        f"--model.patcher.{name} {value}"
        for name, value in flags.items()
        if value != getattr(usual, name.replace("-", "_"))
    ]
    print(f"train with it:  bytelm train configs/blt_tiny.yaml --train.patcher {given['model']} {' '.join(more)}")
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
