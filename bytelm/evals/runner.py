"""Runs units of suites over models: what is done is written down at once and not done again."""

import datetime
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from bytelm.checkpoint import CheckpointError, find_checkpoint, list_steps
from bytelm.config import ConfigError
from bytelm.evals.entrants import entrants
from bytelm.evals.results import Result, Results, key_of
from bytelm.evals.suites import VERSION, Material, Unit
from bytelm.evals.summary import Summary
from bytelm.metrics import versions
from bytelm.protocol import ByteLM, ImpossibleText
from bytelm.vocab import ReservedByteError

# Of one model, which the others need not wait for.
FAULTS = (ConfigError, CheckpointError, OSError, MemoryError, jax.errors.JaxRuntimeError)
LABEL, COLUMN = 24, 14  # characters of the headline's first column, and of the others
FACTS = "facts.json"  # in the results' folder: what the last run measured, on what
WRITTEN = ("results.jsonl", FACTS, "report.html")  # by an evaluation, beside pictures


def names_of(paths: Sequence[Path]) -> list[str]:
    """Short names of models: the last part of each path, or more of it where that is not enough."""
    short = [path.name.removesuffix(".gguf") or str(path) for path in paths]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths)]


def identity(path: Path, checkpoint: str, out: Path) -> list[tuple[str, str]]:
    """What a model's files are: their names in its folder, and hashes of what they hold; without those in the results'
    folder `out`. A copy on another machine is the same model."""
    inside = path.resolve() in out.resolve().parents
    if path.is_dir() and (list_steps(path / "checkpoints") or list_steps(path / "best")):
        path = find_checkpoint(path, checkpoint)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if inside:
        files = [p for p in files if out.resolve() not in p.resolve().parents]
    elif path.resolve() == out.resolve():
        files = [p for p in files if p.parent != path or (p.name not in WRITTEN and p.suffix != ".png")]
    found = []
    for p in files:
        with p.open("rb") as file:
            found.append((p.relative_to(path).as_posix(), hashlib.file_digest(file, "blake2b").hexdigest()))
    return found


def sets_of(units: Sequence[Unit]) -> dict[str, str]:
    """A short name for all that each suite asks."""
    asked: dict[str, list] = {}
    for unit in units:
        asked.setdefault(unit.suite, []).append((unit.task, unit.decides))
    return {suite: key_of(version=VERSION, asked=each) for suite, each in asked.items()}


def run_units(
    paths: Sequence[Path],
    load: Callable[[Path], ByteLM],
    how: Mapping[str, object],
    units: Sequence[Unit],
    results: Results,
    console: Console,
) -> tuple[list[Result], list[str]]:
    """Results of every unit that fits each model, in order, models outermost; and what could not be done, which the
    same call tries again. `how` is all that decides, beside its files, what `load` gives: its checkpoint among it. A
    unit whose text a model cannot have (no text of its tokenizer begins with it, bytes that it keeps for itself) has no
    figures, and its details say why. A single model that cannot be loaded raises."""
    found, failed, sets = [], [], sets_of(units)

    def fail(what: str, error: Exception) -> None:
        failed.append(f"{what}: {error}")
        console.print(failed[-1], markup=False)

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for path, name in zip(paths, names_of(paths)):
            try:
                lm, files = load(path), identity(path, str(how["checkpoint"]), results.path.parent)
            except FAULTS as e:
                if len(paths) == 1:
                    raise
                fail(name, e)
                continue
            for entrant in entrants(name, lm):
                mine = [unit for unit in units if unit.fits(entrant)]
                task = progress.add_task(escape(entrant.name), total=len(mine))
                began, known, done = time.perf_counter(), 0, 0
                for unit in mine:
                    progress.update(task, description=escape(f"{entrant.name}: {unit.suite} {unit.task}"))
                    progress.advance(task)
                    key = key_of(version=VERSION, model=files, view=type(entrant.lm).__name__, how=dict(how),
                                 suite=unit.suite, task=unit.task, decides=unit.decides)  # fmt: skip
                    if key not in results.found:
                        try:
                            metrics, details = unit.run(entrant)
                        except (ImpossibleText, ReservedByteError) as e:
                            metrics, details = {}, {"impossible": str(e)}
                            console.print(f"{entrant.name}, {unit.suite} {unit.task}: {e}", markup=False)
                        except (*FAULTS, FloatingPointError) as e:
                            fail(f"{entrant.name}, {unit.suite} {unit.task}", e)
                            continue
                        done += 1
                    else:
                        metrics, details = results.found[key].metrics, results.found[key].details
                        known += 1
                    result = Result(key, entrant.name, unit.suite, unit.task, metrics, details, sets[unit.suite])
                    if results.found.get(key) != result:  # new, or known under another name or in another set
                        results.add(result)
                    found.append(result)
                progress.remove_task(task)
                console.print(f"{entrant.name}: {done} tasks done in {time.perf_counter() - began:.0f} s, "
                              f"{known} known", markup=False)  # fmt: skip
    return found, failed


def headline(summary: Summary, width: int = 80) -> list[RichTable]:
    """The headline table for a terminal of some width: a column a model, as figures are many and models few; in as many
    tables as it takes."""
    source = summary.headline()
    each = max((width - LABEL) // COLUMN, 1)
    tables = []
    for begin in range(0, len(source.rows), each):
        rows = source.rows[begin : begin + each]
        table = RichTable(box=None, pad_edge=False)
        table.add_column("", no_wrap=True, min_width=LABEL - 2)
        for row in rows:
            table.add_column(escape(row[0]), justify="right", overflow="fold", min_width=COLUMN - 2)
        for n, name in enumerate(source.columns[1:], 1):
            table.add_row(name, *(row[n] for row in rows))
        tables.append(table)
    return tables


def facts(paths: Sequence[Path], text: str, suites: Sequence[str], material: Material) -> dict[str, str]:
    """What was measured, on what, with what."""
    corpus = material.__dict__.get("opened")  # if a suite needed it
    return {
        "models": ", ".join(map(str, paths)), "suites": ", ".join(suites),
        "text": text + (f" ({corpus.describe()})" if corpus is not None else ""),
        "sizes": ", ".join(f"{k} {v}" for k, v in vars(material.sizes).items()) + " (0: all)",
        "seed": str(material.seed), "device": f"{jax.devices()[0].device_kind} x {len(jax.devices())}",
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def keep_facts(out: Path, about: Mapping[str, str], lines: Mapping[str, float], units: Sequence[Unit]) -> None:
    """Writes down what a run was, for `--report`: its facts, compressor lines (without any, those of the run before),
    and the sets that it asked."""
    kept = {"facts": about, "lines": lines or kept_facts(out).get("lines", {}), "sets": sets_of(units)}
    temporary = (out / FACTS).with_suffix(".tmp")
    temporary.write_text(json.dumps(kept), encoding="utf-8")
    temporary.replace(out / FACTS)


def kept_facts(out: Path) -> dict[str, Any]:
    """What the last run in a folder was; nothing where there is none, or another program's file."""
    try:
        kept = json.loads((out / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) and kept.keys() == {"facts", "lines", "sets"} else {}
