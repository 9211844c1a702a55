"""What the results of several models say together: one row of headline figures a model, and a table a suite."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bytelm.evals.choices import interval
from bytelm.evals.chunk_quality import ENGLISH
from bytelm.evals.hellaswag import CHANCE, robustness, robustness_interval
from bytelm.evals.noisy import NOISES, recovered
from bytelm.evals.results import Result

CUT = " Some contexts are longer than a model's window: it does not see their beginning, and models do not see alike."
BASES = ("without", "clean")  # tasks of the noise suite that are no noise
SPELLINGS = ("counting", "sums")  # suites that ask the same in several spellings
ACCURACIES = ("cute", "charbench", "probes", "langgame", "counting", "sums", "traps")


@dataclass(frozen=True)
class Table:
    """A suite's figures: rows of models, and what the columns mean."""

    title: str
    about: str
    columns: list[str]
    rows: list[list[str]]


class Summary:
    """The results of one evaluation, by model, suite and task, in the order in which they were asked for."""

    def __init__(self, results: Sequence[Result], lines: dict[str, float] | None = None):
        """`lines`: bits per byte of compressors on the same text."""
        self.lines = lines or {}
        self.models = list(dict.fromkeys(r.model for r in results))
        self.found: dict[tuple[str, str], dict[str, Result]] = {}
        for result in results:
            self.found.setdefault((result.model, result.suite), {})[result.task] = result

    def tasks(self, suite: str) -> list[str]:
        """Tasks of a suite that some model has a result for."""
        return list(dict.fromkeys(task for model in self.models for task in self.of(model, suite)))

    def of(self, model: str, suite: str) -> dict[str, Result]:
        return self.found.get((model, suite), {})

    def metric(self, model: str, suite: str, task: str, name: str) -> float:
        """One figure; nan where there is none."""
        result = self.of(model, suite).get(task)
        value = math.nan if result is None else result.metrics.get(name, math.nan)
        return math.nan if value is None else value

    def mean(self, model: str, suite: str, name: str = "accuracy") -> float:
        """A figure's mean over the tasks of a suite; nan unless the model has them all."""
        return float(np.mean([self.metric(model, suite, task, name) for task in self.tasks(suite)] or [math.nan]))

    def recovered(self, model: str, rule: str) -> float:
        """The share of a context's help that is left when it is noised; nan where a clean context's help is less than
        twice its standard error over the passages, or where some text is impossible for the model."""
        without, clean, noised = (_nats(self.of(model, "noise").get(task)) for task in (*BASES, rule))
        help_ = without - clean
        if not (help_.sum() > 0 and help_.mean() >= 2 * help_.std() / math.sqrt(len(help_))):
            return math.nan
        return recovered(*(float(nats.sum()) for nats in (without, clean, noised)))

    def rules(self) -> list[str]:
        return [task for task in self.tasks("noise") if task not in BASES]

    def _headline_rules(self) -> list[str]:
        """The rules whose mean is a headline: the same eight, whatever else was asked."""
        return [rule for rule in self.rules() if rule in NOISES]

    def noisy_bpb(self, model: str) -> float:
        """Mean bits per byte behind a noised context, over the rules."""
        bits = [self.metric(model, "noise", rule, "bpb") for rule in self._headline_rules()]
        return float(np.mean(bits or [math.nan]))

    def mean_recovered(self, model: str) -> float:
        return float(np.mean([self.recovered(model, rule) for rule in self._headline_rules()] or [math.nan]))

    def hellaswag(self, model: str) -> tuple[float, float, float, tuple[float, float]]:
        """(clean, noisy, robustness score, its interval), accuracies normalised by characters as in the papers."""
        results = self.of(model, "hellaswag")
        noisy = [task for task in results if task != "clean"]
        if "clean" not in results or len(noisy) < 15:
            return math.nan, math.nan, math.nan, (math.nan, math.nan)
        flags = {task: _flags(results[task]) for task in results}
        if not all(map(len, flags.values())):
            return math.nan, math.nan, math.nan, (math.nan, math.nan)
        stacked = np.stack([flags[task] for task in noisy])
        clean, mean = float(flags["clean"].mean()), float(stacked.mean())
        return clean, mean, robustness(clean, mean, CHANCE), robustness_interval(flags["clean"], stacked)

    def headline(self) -> Table:
        """One row a model."""
        columns: list[tuple[str, list[str]]] = []

        def add(name: str, values: list[float], digits: int = 3, per_cent: bool = False) -> None:
            if any(math.isfinite(v) for v in values):
                columns.append((name, [shown(v, digits, per_cent) for v in values]))

        columns.append(("parameters", [_count(self.metric(m, "model", "size", "parameters")) for m in self.models]))
        columns.append(("window", [self._window(m) for m in self.models]))
        add("bits per byte", [self.metric(m, "bpb", "text", "bpb") for m in self.models])
        add("bytes per unit", [self.innermost(m, "bytes_per_unit") for m in self.models], 2)
        add("behind clean context", [self.metric(m, "noise", "clean", "bpb") for m in self.models])
        add("behind noised context", [self.noisy_bpb(m) for m in self.models])
        add("recovered", [self.mean_recovered(m) for m in self.models], 1, True)
        for suite in ACCURACIES:
            add(
                f"{suite} (chance {shown(self.chance(suite), 0, True)})",
                [self.mean(m, suite) for m in self.models],
                1,
                True,
            )
        scores = [self.hellaswag(m) for m in self.models]
        add("HellaSwag", [s[0] for s in scores], 1, True)
        add("under noise", [s[1] for s in scores], 1, True)
        if any(math.isfinite(s[0]) for s in scores):
            cells = [
                f"{shown(s[2], 0)} ({shown(s[3][0], 0)} to {shown(s[3][1], 0)})" if math.isfinite(s[2]) else "-"
                for s in scores
            ]
            columns.append(("robustness (95 %)", cells))
        rows = [[model, *(values[n] for _, values in columns)] for n, model in enumerate(self.models)]
        if any(name == "bits per byte" for name, _ in columns):
            rows += [[line, *(shown(bpb) if name == "bits per byte" else "" for name, _ in columns)]
                     for line, bpb in self.lines.items()]  # fmt: skip
        return Table("Headline", "", ["model", *(name for name, _ in columns)], rows)

    def record(self) -> dict[str, dict[str, dict[str, dict[str, float | None]]]]:
        """Every figure, as {model: {suite: {task: {name: number}}}}, with None for what is not a number; compressor
        lines under "compressors"."""
        out: dict = {"compressors": {"bpb": {"text": dict(self.lines)}}} if self.lines else {}
        for (model, suite), results in self.found.items():
            for task, result in results.items():
                numbers = {k: v if v is not None and math.isfinite(v) else None for k, v in result.metrics.items()}
                out.setdefault(model, {}).setdefault(suite, {})[task] = numbers
        for model in self.models:
            for rule in (rule for rule in self.rules() if rule in self.of(model, "noise")):
                share = self.recovered(model, rule)
                out[model]["noise"][rule]["recovered"] = share if math.isfinite(share) else None
        return out

    def _window(self, model: str) -> str:
        """How far a model sees."""
        size, tokens = (self.metric(model, "model", "size", name) for name in ("window", "window_tokens"))
        if math.isfinite(tokens):
            return f"{tokens:,.0f} tokens"
        return f"{size:,.0f} bytes" if math.isfinite(size) else "-"

    def chance(self, suite: str) -> float:
        """Mean of what guessing gives over a suite's tasks."""
        return float(np.mean([self.chance_of(suite, t) for t in self.tasks(suite)] or [math.nan]))

    def chance_of(self, suite: str, task: str) -> float:
        """What guessing gives in a task, as the first model that could be asked says."""
        each = (self.metric(m, suite, task, "chance") for m in self.models)
        return next((value for value in each if math.isfinite(value)), math.nan)

    def innermost(self, model: str, name: str) -> float:
        """A figure of a model's innermost units."""
        levels = self.metric(model, "chunks", "text", "levels")
        return self.metric(model, "chunks", "text", f"{name}_{int(levels) - 1}") if levels >= 1 else math.nan

    def tables(self) -> list[Table]:
        """The suites' tables: a row a model, a column a task."""
        each = map(self._accuracy, ACCURACIES), map(self._written, ACCURACIES)
        found = [self._noise(), *each[0], *each[1], self._accuracy("records"), self._hellaswag(), self._words(),
                 self._chunks(), self._languages(), self._morphemes(), self._variants()]  # fmt: skip
        return [table for table in found if table]

    def _noise(self) -> Table | None:
        rules = self.rules()

        def cell(model: str, rule: str) -> str:
            bits = self.metric(model, "noise", rule, "bpb")
            return f"{shown(bits)} ({shown(self.recovered(model, rule), 0, True)})"

        rows = [[m, *(shown(self.metric(m, "noise", b, "bpb")) for b in BASES), *(cell(m, rule) for rule in rules)]
                for m in self.models if self.of(m, "noise")]  # fmt: skip
        about = (
            "Bits per byte of 256 bytes of clean text behind 512 bytes of context that a rule has noised, and in "
            "brackets the share of the context's help that is left: (without - noised) / (without - clean)."
        )
        if any(self.metric(m, "noise", t, "cut") > 0 for m in self.models for t in self.tasks("noise")):
            about += CUT
        columns = ["model", "no context", "clean", *rules]
        return Table("Clean text behind noised context", about, columns, rows) if rows else None

    def _accuracy(self, suite: str) -> Table | None:
        tasks = self.tasks(suite)
        rows = []
        for model in self.models:
            cells = []
            for task in tasks:
                flags = _flags(self.of(model, suite).get(task), "gain")
                if not len(flags):
                    cells.append("-")
                    continue
                low, high = interval(int(flags.sum()), len(flags))
                cells.append(f"{shown(float(flags.mean()), 0, True)} ({100 * low:.0f}-{100 * high:.0f})")
            if any(cell != "-" for cell in cells):
                rows.append([model, *cells])
                if suite in SPELLINGS:
                    shares = [self.metric(model, suite, task, "accuracy") for task in tasks]
                    rows[-1].append(shown(max(shares) - min(shares), 0, True))
        if not rows:
            return None
        rows.append(["chance", *(shown(self.chance_of(suite, t), 0, True) for t in tasks)])
        about = (
            "Share of questions whose right answer, of those offered, is the one that the question makes most more "
            "probable (95 % interval): what answers are of themselves, long or frequent or misspelt, does not count."
        )
        if suite == "records":
            about = (
                "Share of records whose right answer is the most probable of those offered, by its sum, or, where none "
                "is offered, what greedy decoding writes (95 % interval)."
            )
        if any(self.metric(m, suite, t, "cut") > 0 for m in self.models for t in tasks):
            about += CUT
        columns = ["model", *tasks]
        if suite in SPELLINGS:
            columns.append("spread")
            rows[-1].append("")
            about += " The same questions in every column: the spread is what their spelling does."
        return Table(suite, about, columns, rows)

    def _written(self, suite: str) -> Table | None:
        tasks = self.tasks(f"{suite}-written")
        rows = [[m, *(shown(self.metric(m, f"{suite}-written", t, "accuracy"), 0, True) for t in tasks)]
                for m in self.models if self.of(m, f"{suite}-written")]  # fmt: skip
        about = "Share of answers written out right, to the letter."
        return Table(f"{suite}, written", about, ["model", *tasks], rows) if rows else None

    def _hellaswag(self) -> Table | None:
        tasks = self.tasks("hellaswag")
        rows = [[m, *(shown(self.metric(m, "hellaswag", t, "accuracy_characters"), 0, True) for t in tasks)]
                for m in self.models if self.of(m, "hellaswag")]  # fmt: skip
        about = "Accuracy normalised by characters; chance 25 %. Noise on the context, the endings, or both."
        if any(self.metric(m, "hellaswag", t, "cut") > 0 for m in self.models for t in tasks):
            about += CUT
        return Table("HellaSwag", about, ["model", *tasks], rows) if rows else None

    def _words(self) -> Table | None:
        models = [m for m in self.models if self.of(m, "words")]
        if not models:
            return None
        every = (n for m in models for n in self.of(m, "words")["text"].metrics if n.startswith("accuracy"))
        names = list(dict.fromkeys(every))
        rows = [[m, *(shown(self.metric(m, "words", "text", n), 1, True) for n in names)] for m in models]
        about = "Share of words in running text each of whose bytes is the most probable one, by rank of frequency."
        return Table("Words", about, ["model", *(n.removeprefix("accuracy_") for n in names)], rows)

    def _chunks(self) -> Table | None:
        names = {
            "bytes_per_unit": "bytes per unit", "variation": "variation", "p5": "p5", "p50": "p50", "p95": "p95",
            "longest": "longest", "single": "single bytes", "at_space": "begin at white space",
            "inside_character": "begin inside a character", "word_precision": "words: precision",
            "word_recall": "recall", "word_f1": "F1", "word_lift": "lift", "renyi": "Rényi", "stability": "stability",
        }  # fmt: skip
        rows = []
        for model in self.models:
            levels = self.metric(model, "chunks", "text", "levels")
            for level in range(int(levels) if levels >= 1 else 0):
                values = [self.metric(model, "chunks", "text", f"{name}_{level}") for name in names]
                rows.append([f"{model}, level {level}" if levels > 1 else model, *(shown(v, 2) for v in values)])
        about = (
            "Units of the text. Precision and recall against the places between words; lift is F1 over that of as many "
            "random boundaries; stability is the share of boundaries kept, away from a slip of one letter."
        )
        return Table("Units", about, ["model", *names.values()], rows) if rows else None

    def _languages(self) -> Table | None:
        tasks = self.tasks("languages")
        english = next((task for task in tasks if task in ENGLISH), "")

        def over_english(model: str, task: str, name: str) -> float:
            return self.metric(model, "languages", task, name) / self.metric(model, "languages", english, name)

        names = {"bytes": "bytes", "units": "units", "nats": "bits"}
        rows = [[f"{m}, {label}", *(shown(over_english(m, t, name), 2) for t in tasks)]
                for m in self.models for name, label in names.items()
                if math.isfinite(self.metric(m, "languages", english, name))]  # fmt: skip
        about = "What the same sentences cost in a language, over English: bytes, units, and bits of the whole text."
        if any(self.metric(m, "languages", t, "aligned") == 0 for m in self.models for t in tasks):
            about += " The files have different numbers of lines, so each was taken whole."
        return Table("Languages", about, ["model", *tasks], rows) if rows else None

    def _morphemes(self) -> Table | None:
        tasks, names = self.tasks("morphemes"), ("precision", "recall", "f1", "lift", "density")
        rows = [[f"{m}, {t}", *(shown(self.metric(m, "morphemes", t, n), 2) for n in names)]
                for m in self.models for t in tasks if t in self.of(m, "morphemes")]  # fmt: skip
        about = "Unit boundaries inside words against boundaries of morphemes; lift is over random boundaries."
        return Table("Morphemes", about, ["model, file", *names], rows) if rows else None

    def _variants(self) -> Table | None:
        names = {"same": "other form", "slip": "slip", "told": "form over slip"}
        rows = [[m, *(shown(self.metric(m, "variants", "british", n)) for n in names)]
                for m in self.models if self.of(m, "variants")]  # fmt: skip
        about = (
            "British and American forms of a word: bits a byte by which the text behind changes when the other form, "
            "or a slip, stands in its place; share of forms that are more probable than with a slip."
        )
        return Table("Forms of a word", about, ["model", *names.values()], rows) if rows else None


def shown(value: float, digits: int = 3, per_cent: bool = False) -> str:
    """A figure for a table."""
    if not math.isfinite(value):
        return "-"
    return f"{100 * value:.{digits}f} %" if per_cent else f"{value:.{digits}f}"


def _count(number: float) -> str:
    """A number of parameters."""
    if not number > 0:
        return "-"
    if number < 1e6:
        return f"{number:,.0f}"
    return f"{number / 1e6:,.1f} M" if number < 1e9 else f"{number / 1e9:,.2f} B"


def _nats(result: Result | None) -> np.ndarray:
    """Nats of each passage; one nan where there are none, or some is impossible."""
    nats = [] if result is None else result.details.get("nats", [])
    return np.array([math.nan] if not nats or None in nats else nats)


def _flags(result: Result | None, by: str = "characters") -> np.ndarray:
    """Which items are right; none for a result that there is not."""
    return np.array([flag == "1" for flag in ("" if result is None else result.details.get(by, ""))], bool)
