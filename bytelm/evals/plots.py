"""The pictures of an evaluation, as PNG files."""

import math
from pathlib import Path
from typing import Any

from bytelm.evals.summary import Summary

COLOURS = ("#2b5f9e", "#c8502d", "#3d8b57", "#8a5fa8", "#b08a1f", "#4aa3a8", "#a0485f", "#6b6b6b")
MARKS = "oDs^"  # a round of colours each


def draw(summary: Summary, folder: Path) -> list[tuple[Path, str]]:
    """Draws what there are results for: (file, caption) of each picture."""
    import matplotlib

    matplotlib.use("Agg")
    pictures = [
        (folder / "bits.png", "Bits per byte of the text, and of compressors given the same training text.", _bits),
        (folder / "noise.png", "How much of a context's help is left when it is noised.", _noise),
        (folder / "cute.png", "CUTE by likelihood; the grey marks are what guessing gives.", _cute),
        (folder / "lengths.png", "Lengths of units, innermost level.", _lengths),
    ]
    return [(path, caption) for path, caption, make in pictures if make(summary, path)]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), dpi=120, layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> bool:
    from matplotlib import pyplot as plt

    figure.savefig(path)
    plt.close(figure)
    return True


def _bits(summary: Summary, path: Path) -> bool:
    found = {m: summary.metric(m, "bpb", "text", "bpb") for m in summary.models}
    bars = [(m, v, _colour(summary, m)) for m, v in found.items() if math.isfinite(v)]
    if not bars:
        return False
    bars += [(name, value, "#b9bec5") for name, value in summary.lines.items()]
    bars.sort(key=lambda bar: -bar[1])
    figure, axes = _figure(8, 0.9 + 0.36 * len(bars))
    names, values, colours = zip(*bars)
    axes.barh(names, values, height=0.62, color=colours)
    for y, value in enumerate(values):
        axes.annotate(f"{value:.3f}", (value, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlabel("bits per byte")
    axes.set_xlim(0, 1.1 * max(values))
    return _save(figure, path)


def _dots(
    summary: Summary, path: Path, rows: list[str], values: dict[str, list[float]], label: str, marks=None
) -> bool:
    """One line a task, one dot a model (an arrow where it lies outside); `marks`: a grey tick on each line."""
    values = {m: v for m, v in values.items() if any(map(math.isfinite, v))}
    if not rows or not values:
        return False
    figure, axes = _figure(8, 1.4 + 0.34 * len(rows))
    places = list(range(len(rows)))[::-1]
    axes.hlines(places, 0, 100, color="#eeeeee", linewidth=1)
    if marks is not None:
        axes.plot(marks, places, "|", color="#999999", markersize=14, markeredgewidth=2)
    every = [v for each in values.values() for v in each if math.isfinite(v)]
    low, high = max(min(0, *every), -60), min(max(100, *every), 130)
    step = 0.5 / max(len(values), 1)
    for n, (model, each) in enumerate(values.items()):
        shift = (n - (len(values) - 1) / 2) * step
        colour = _colour(summary, model)
        within = [v if low <= v <= high else math.nan for v in each]
        axes.plot(within, [p - shift for p in places], _mark(summary, model), color=colour,
                  markersize=6, label=model)  # fmt: skip
        for value, place in zip(each, places):  # what is further out stands at the edge, as an arrow
            if value < low or value > high:
                x, arrow = (low - 1, "<") if value < low else (high + 1, ">")
                axes.plot(x, place - shift, arrow, color=colour, markersize=6)
    axes.set_yticks(places, rows)
    axes.set_xlim(low - 3, high + 3)
    axes.set_xlabel(label)
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=2)
    return _save(figure, path)


def _noise(summary: Summary, path: Path) -> bool:
    rules = summary.rules()
    values = {m: [100 * summary.recovered(m, rule) for rule in rules] for m in summary.models}
    return _dots(summary, path, rules, values, "share of the context's help that is left, per cent")


def _cute(summary: Summary, path: Path) -> bool:
    tasks = summary.tasks("cute")
    values = {m: [100 * summary.metric(m, "cute", task, "accuracy") for task in tasks] for m in summary.models}
    chance = [100 * summary.chance_of("cute", task) for task in tasks]
    return _dots(summary, path, tasks, values, "questions right, per cent", chance)


def _lengths(summary: Summary, path: Path) -> bool:
    found = {}
    for model in summary.models:
        levels = summary.metric(model, "chunks", "text", "levels")
        if levels >= 1:
            found[model] = summary.of(model, "chunks")["text"].details[f"lengths_{int(levels) - 1}"]
    if not found:
        return False
    figure, axes = _figure(8, 4)
    for model, counts in found.items():
        total = sum(counts)
        axes.plot(range(1, len(counts)), [100 * c / total for c in counts[1:]], f"{_mark(summary, model)}-",
                  markersize=3, linewidth=1.2, color=_colour(summary, model), label=model)  # fmt: skip
    axes.set_xlabel("bytes of a unit (32 and more together)")
    axes.set_ylabel("share of units, per cent")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def _colour(summary: Summary, model: str) -> str:
    return COLOURS[summary.models.index(model) % len(COLOURS)]


def _mark(summary: Summary, model: str) -> str:
    return MARKS[summary.models.index(model) // len(COLOURS) % len(MARKS)]
