"""The suites of `bytelm eval`: what each asks a model, as units of work that are done and written down one by one. What
the results say together (`summary.py`) is worked out from them alone."""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bytelm.byteview.plain_tokens import PlainTokens
from bytelm.config import ConfigError
from bytelm.data.corpus import Corpus
from bytelm.data.noise import RULES, Draws, Noise, misspeller, noised
from bytelm.evals import chunk_quality, counting, cute, langgame, noisy, records, traps, word_tasks
from bytelm.evals.bpb import bits_per_byte, first_bytes
from bytelm.evals.choices import Question, ask
from bytelm.evals.entrants import Entrant, longer, parameters
from bytelm.evals.hellaswag import CHANCE as HELLASWAG_CHANCE
from bytelm.evals.hellaswag import TASKS as HELLASWAG_TASKS
from bytelm.evals.hellaswag import Item, hellaswag_questions, read_hellaswag
from bytelm.evals.noisy import NOISES
from bytelm.evals.variants import PAIRS, variants_unit
from bytelm.evals.word_chain import word_unit
from bytelm.lm import NetworkLM, load_vocabulary
from bytelm.vocab import complete_prefix

VERSION = 3  # of what the suites ask; goes up when a result would be another
MISSPELT = 0.3  # share of the words that have a misspelling in the list
Found = tuple[dict[str, float], dict[str, Any]]  # metrics, details by item


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of each suite is run."""

    bpb_bytes: int = 200_000  # of text for bits per byte and words; 0: all
    chunk_bytes: int = 200_000  # of text for units
    passages: int = 64  # of the noise suite
    items: int = 50  # of each task of CUTE (0: all there are), CharBench and the like
    hellaswag: int = 40  # items, each under sixteen tasks; 0: all
    sentences: int = 100  # of each language; 0: all
    noises: tuple[str, ...] = NOISES

    @staticmethod
    def full() -> "Sizes":
        return Sizes(bpb_bytes=0, chunk_bytes=1 << 20, passages=1024, items=1000, hellaswag=0, sentences=0,
                     noises=tuple(RULES))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Material:
    """The texts and files that the suites read. `text` may be a function that opens it, for suites that need none."""

    text: Corpus | Callable[[], Corpus] | None = None
    cute: Path | None = None  # folder with CUTE's TSV files
    hellaswag: Path | None = None  # JSONL in the published format
    misspellings: Path | None = None  # lines `typo->word`
    words: Path | None = None  # text to take words from; none: the text
    parallel: Path | None = None  # folder of LANGUAGE.txt with a sentence a line, en.txt or eng.txt among them
    tokenizer: Path | None = None  # tokenized model whose tokens set the traps
    morphemes: tuple[Path, ...] = ()  # files of words and their morphemes (SIGMORPHON 2022)
    records: tuple[Path, ...] = ()  # JSONL files of questions (`records.py`)
    seed: int = 0
    sizes: Sizes = field(default_factory=Sizes)

    @cached_property
    def opened(self) -> Corpus | None:
        return self.text() if callable(self.text) else self.text

    def need_text(self, suite: str) -> Corpus:
        if self.opened is None or not len(self.opened):
            raise ConfigError(f"suite {suite}: needs text that the models have not seen: give --text FILE")
        return self.opened

    def documents(self, suite: str, most: int) -> list[bytes]:
        """Documents of the text up to so many bytes (0: all), the last one cut at a character."""
        found = list(first_bytes(self.need_text(suite), most))
        return [text[: complete_prefix(text)] for text in found]

    @cached_property
    def items(self) -> list[Item]:
        """Items of HellaSwag, from all over the file: its two sources stand one behind the other."""
        assert self.hellaswag is not None
        found = read_hellaswag(self.hellaswag)
        picked = Draws(self.seed, "hellaswag").shuffled(list(range(len(found))))[: self.sizes.hellaswag or None]
        return [found[n] for n in sorted(picked)]

    @cached_property
    def passages(self) -> list[noisy.Passage]:
        found = noisy.passages(self.need_text("noise"), self.sizes.passages)
        if not found:
            raise ConfigError(f"suite noise: no document has {noisy.CONTEXT + noisy.CONTINUATION} bytes")
        return found

    @cached_property
    def word_counts(self):
        if self.words is not None:
            return word_tasks.words_of([self.words.read_bytes()])
        return word_tasks.words_of(first_bytes(self.need_text("words"), 4 << 20))

    @cached_property
    def rules(self) -> dict[str, Noise]:
        rules = {name: RULES[name] for name in self.sizes.noises}
        return rules | ({"misspelt": misspeller(self.misspellings, MISSPELT)} if self.misspellings else {})


@dataclass(frozen=True)
class Unit:
    """One task for one model: what it is called, what decides its result beside the model, and how it is run."""

    suite: str
    task: str
    decides: Mapping[str, Any]
    run: Callable[[Entrant], Found]
    fits: Callable[[Entrant], bool] = lambda entrant: True


def _picked(questions: list[Question], chance: float) -> Callable[[Entrant], Found]:
    """Questions whose endings are compared by likelihood."""

    def run(entrant: Entrant) -> Found:
        choices = ask(entrant.lm, questions)
        right = {by: choices.right(by) for by in ("gain", "sum", "bytes", "characters")}
        metrics = {"accuracy": right["gain"].mean(), **{f"accuracy_{by}": flags.mean() for by, flags in right.items()},
                   "chance": chance, "items": len(questions),
                   "cut": np.mean([longer(entrant.lm, q.context + q.endings[0]) for q in questions])}  # fmt: skip
        details = {by: "".join(map(str, flags.astype(int))) for by, flags in right.items()}
        return {name: float(value) for name, value in metrics.items()}, details

    return run


def _written(questions: list[Question]) -> Callable[[Entrant], Found]:
    """Questions whose answers are written out, up to the closing quotation mark."""

    def run(entrant: Entrant) -> Found:
        longest = max(len(ending) for q in questions for ending in q.endings)
        prompts = [q.context for q in questions]
        if not isinstance(entrant.lm, PlainTokens):  # which sees to it itself
            prompts = [p[max(len(p) + longest + 8 - entrant.lm.window, 0) :] for p in prompts]
        written: list[bytes] = []
        for begin in range(0, len(prompts), 64):
            written += entrant.lm.generate_batch(prompts[begin : begin + 64], longest + 4, temperature=0,
                                                 stop=(b'"', b"\n"))  # fmt: skip
        right = [text.strip() == q.stems[q.answer].encode() for text, q in zip(written, questions)]
        return ({"accuracy": float(np.mean(right)), "items": float(len(right))},
                {"written": [text.decode("utf-8", "replace") for text in written[:8]]})  # fmt: skip

    return run


def _size(entrant: Entrant) -> Found:
    """How large a model is, and how far it sees."""
    found = {"parameters": float(parameters(entrant.lm)), "window": float(entrant.lm.window)}
    if isinstance(entrant.lm, PlainTokens):
        found = found | {"window_tokens": float(entrant.lm.lm.model.config.context)}
    return found, {}


SIZE = Unit("model", "size", {}, _size)


def _bpb(material: Material) -> Iterator[Unit]:
    most = material.sizes.bpb_bytes
    documents = material.documents("bpb", most)

    def run(entrant: Entrant) -> Found:
        result = bits_per_byte(
            lambda group: [-s.total for s in entrant.lm.score_batch(group)], documents, entrant.lm.window
        )
        return {"bpb": result.bpb, "bytes": float(result.bytes)}, {}

    yield Unit("bpb", "text", {"text": content_of(*documents)}, run, lambda e: e.bits)


def _noise(material: Material) -> Iterator[Unit]:
    found, seed = material.passages, material.seed
    decides = {
        "text": content_of(*(part for p in found for part in (p.name.encode(), p.context, p.text))),
        "seed": seed,
    }

    def unit(task: str, contexts: Callable[[], list[bytes]], more: Mapping[str, Any]) -> Unit:
        def run(entrant: Entrant) -> Found:
            before = contexts()
            scores = entrant.lm.score_batch([p.text for p in found], before)
            nats = np.array([-s.total for s in scores])
            if np.isnan(nats).any():
                raise FloatingPointError("the model's scores are not numbers (nan)")
            sizes = [len(p.text) for p in found]
            bits = float(nats.sum() / sum(sizes) / math.log(2))
            kept = [round(float(n), 6) if math.isfinite(n) else None for n in nats]
            cut = float(np.mean([longer(entrant.lm, c + p.text) for c, p in zip(before, found)]))
            return {"bpb": bits, "cut": cut}, {"nats": kept, "bytes": sizes}

        return Unit("noise", task, {**decides, **more}, run)

    yield unit("without", lambda: [b""] * len(found), {})
    yield unit("clean", lambda: [p.context for p in found], {})
    for name, rule in material.rules.items():
        more = {"list": file_content(material.misspellings), "share": MISSPELT} if name == "misspelt" else {}

        def contexts(name=name, rule=rule) -> list[bytes]:
            return [noised(p.context, rule, seed=seed, document=p.name, field="context", name=name) for p in found]

        yield unit(name, contexts, more)


def _cute(material: Material) -> Iterator[Unit]:
    if material.cute is None:
        raise ConfigError("suite cute: needs CUTE's data, a folder of TSV files (github.com/Leukas/CUTE, data/): "
                          "--cute DIR")  # fmt: skip
    tasks = (*cute.TASKS, *(cute.RANDOM if material.sizes.items >= 1000 else ()))
    for task in tasks:
        questions = cute.questions(material.cute, task, material.sizes.items, material.seed)
        yield from _asked("cute", task, questions, cute.chance(task))


def _asked(suite: str, task: str, questions: list[Question], chance: float, *, writes: bool = True) -> Iterator[Unit]:
    """A task by likelihood, and written out."""
    decides = {"questions": [dataclasses.astuple(question) for question in questions]}
    yield Unit(suite, task, decides, _picked(questions, chance))
    if writes:
        yield Unit(f"{suite}-written", task, decides, _written(questions))


def _words(material: Material, table: Mapping[str, Any], suite: str) -> Iterator[Unit]:
    for task in table:
        questions = word_tasks.questions(material.word_counts, task, material.sizes.items, material.seed)
        single = task not in ("substring", "common_substring", "unscramble")  # these have several right answers
        yield from _asked(suite, task, questions, word_tasks.CHANCE[task], writes=single)


def _langgame(material: Material) -> Iterator[Unit]:
    words = word_tasks.frequent(material.word_counts)
    for kind in langgame.KINDS:
        drawn = langgame.language_questions(words, kind, material.seed)
        questions = list(itertools.islice(drawn, material.sizes.items))
        yield from _asked("langgame", kind, questions, 1 / 4, writes=False)
    backwards = langgame.sum_questions(material.sizes.items, material.seed)
    yield from _asked("langgame", "sums_backwards", backwards, 1 / 4, writes=False)


def _counting(material: Material) -> Iterator[Unit]:
    count = material.sizes.items
    for spelling in counting.SPELLINGS:
        questions = counting.count_questions(spelling, count, material.seed)
        yield from _asked("counting", spelling, questions, counting.CHANCE)


def _sums(material: Material) -> Iterator[Unit]:
    count = material.sizes.items
    for form in counting.FORMATS:
        questions = counting.sum_questions(form, count, material.seed)
        yield from _asked("sums", form, questions, counting.CHANCE)


def _hellaswag(material: Material) -> Iterator[Unit]:
    if material.hellaswag is None:
        raise ConfigError("suite hellaswag: needs HellaSwag's validation set as JSONL: --hellaswag FILE")
    for task in HELLASWAG_TASKS:
        questions = hellaswag_questions(material.items, task, material.seed)
        yield from _asked("hellaswag", task, questions, HELLASWAG_CHANCE, writes=False)


def _chunks(material: Material) -> Iterator[Unit]:
    most = material.sizes.chunk_bytes
    documents = material.documents("chunks", most)
    decides = {"text": content_of(*documents), "seed": material.seed}
    run = lambda entrant: chunk_quality.chunk_unit(entrant, documents, material.seed)  # noqa: E731
    yield Unit("chunks", "text", decides, run, chunk_quality.has_chunks)


def _languages(material: Material) -> Iterator[Unit]:
    if material.parallel is None:
        raise ConfigError("suite languages: needs parallel text, a folder of LANGUAGE.txt: --parallel DIR")
    texts, aligned = chunk_quality.read_parallel(material.parallel, material.sizes.sentences)
    for language, sentences in texts.items():
        decides = {"sentences": [s.hex() for s in sentences], "aligned": aligned}

        def run(entrant: Entrant, sentences=sentences) -> Found:
            metrics, details = chunk_quality.language_unit(entrant, sentences)
            return metrics | {"aligned": float(aligned)}, details

        yield Unit("languages", language, decides, run)


def _morphemes(material: Material) -> Iterator[Unit]:
    if not material.morphemes:
        raise ConfigError("suite morphemes: needs words cut into morphemes (SIGMORPHON 2022): --morphemes FILE ...")
    for path in material.morphemes:
        words = Draws(material.seed, "morphemes").shuffled(chunk_quality.read_morphemes(path))
        words = words[: 10 * material.sizes.items or None]

        def run(entrant: Entrant, words=words) -> Found:
            return chunk_quality.morpheme_unit(entrant, words)

        yield Unit("morphemes", _label(path, material.morphemes), {"words": words}, run, chunk_quality.has_chunks)


def _label(path: Path, among: Sequence[Path]) -> str:
    """What the task of a file is called."""
    return path.stem if [p.stem for p in among].count(path.stem) == 1 else str(path)


def _records(material: Material) -> Iterator[Unit]:
    if not material.records:
        raise ConfigError("suite records: needs questions as JSONL (llm-foundry's forms): --records FILE ...")
    for path in material.records:
        rows = Draws(material.seed, "records").shuffled(records.read_records(path))[: material.sizes.items or None]

        def run(entrant: Entrant, rows=rows) -> Found:
            metrics, details = records.records_unit(entrant.lm, rows)
            cut = np.mean([longer(entrant.lm, max(map(b"".join, row.pairs), key=len)) for row in rows])
            return metrics | {"cut": float(cut)}, details

        yield Unit("records", _label(path, material.records), {"rows": [dataclasses.astuple(row) for row in rows]}, run)


def _traps(material: Material) -> Iterator[Unit]:
    if material.tokenizer is None:
        raise ConfigError("suite traps: needs the tokenizer to set them for, a tokenized model: --tokenizer MODEL")
    vocabulary = load_vocabulary(material.tokenizer)

    def cut(text: bytes) -> list[int]:
        ids = vocabulary.encode(text, False) or ()
        ends = itertools.accumulate(len(vocabulary.tokens[i] or b"") for i in ids)
        return [end - len(vocabulary.lead) for end in ends]

    words = word_tasks.frequent(material.word_counts, 5000)
    questions = traps.questions(words, cut, material.sizes.items, material.seed)
    yield from _asked("traps", material.tokenizer.name, questions, traps.CHANCE)


def _variants(material: Material) -> Iterator[Unit]:
    yield Unit("variants", "british", {"seed": material.seed, "pairs": PAIRS},
               lambda entrant: variants_unit(entrant.lm, material.seed))  # fmt: skip


def _chain(material: Material) -> Iterator[Unit]:
    most = material.sizes.bpb_bytes
    documents = material.documents("words", most)
    decides = {"text": content_of(*documents), "words": sorted(material.word_counts.items())}
    run = lambda entrant: word_unit(entrant.lm, documents, material.word_counts)  # noqa: E731
    yield Unit("words", "text", decides, run, lambda e: e.bits and isinstance(e.lm, NetworkLM))


SUITES: dict[str, Callable[[Material], Iterator[Unit]]] = {
    "bpb": _bpb, "noise": _noise, "words": _chain, "chunks": _chunks, "cute": _cute,
    "charbench": lambda m: _words(m, word_tasks.CHARBENCH, "charbench"),
    "probes": lambda m: _words(m, word_tasks.PROBES, "probes"),
    "langgame": _langgame, "counting": _counting, "sums": _sums, "hellaswag": _hellaswag, "languages": _languages,
    "morphemes": _morphemes, "traps": _traps, "variants": _variants, "records": _records,
}  # fmt: skip
# Suites that need a file of the user's: the field that names it.
NEEDS = {
    "cute": "cute",
    "hellaswag": "hellaswag",
    "languages": "parallel",
    "morphemes": "morphemes",
    "traps": "tokenizer",
    "records": "records",
}


def units(
    names: list[str], material: Material, written: bool, left_out: Callable[[str], None] | None = None
) -> list[Unit]:
    """The units of some suites, in order; `written`: also those whose answers are written out. A suite that its texts
    and files do not allow raises ConfigError, or is left out where `left_out` is told why."""
    found = []
    for name in names:
        try:
            found += list(SUITES[name](material))
        except ConfigError as e:
            if left_out is None:
                raise
            left_out(str(e))
    return [unit for unit in found if written or not unit.suite.endswith("-written")]


def content_of(*texts: bytes) -> str:
    """What some texts say, as a hash."""
    found = hashlib.sha256()
    for text in texts:
        found.update(len(text).to_bytes(8, "little") + text)
    return found.hexdigest()


def file_content(path: Path | None) -> str:
    """What a file says, as a hash; empty for none."""
    return "" if path is None else content_of(path.read_bytes())
