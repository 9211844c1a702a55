"""The `eval` command: one figure of one model, or suites over several with a report."""

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

import bytelm
from bytelm import codec
from bytelm.config import ConfigError, DataConfig, HATConfig

EXIT_OK, EXIT_CHECK_FAILED, EXIT_INTERRUPTED = 0, 1, 75
# Options of suites alone, and such as only one figure of one model has.
FOR_SUITES = ("full", "passages", "items", "written", "cute", "hellaswag", "misspellings", "words", "parallel",
              "tokenizer", "morphemes", "records", "seed")  # fmt: skip
FOR_ONE = ("window", "max_bytes", "task")
COMPARE_LIMIT = 256 << 20  # bytes of training text that --compare is willing to compress


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Measures models. Bits per byte of one, printed; or suites over several, written into the folder --out as
    results.jsonl, report.html and pictures. It goes on where it was stopped. Without --text, on the text that the first
    model's run held out; an encoder-decoder, asked alone, on its task's examples."""

    model: tyro.conf.Positional[tuple[Path, ...]]  # runs, checkpoints, weights directories, tokenized models
    suite: str = ""  # with commas between them; none: bpb, or with --out all that there are files for
    out: Path | None = None  # folder for results and report
    full: bool = False  # all of every suite, not a sample
    passages: int = 0  # of the noise suite; 0: 64, with --full 1,024
    items: int = 0  # of each task of questions; 0: 50, with --full 1,000
    report: bool = False  # run nothing: a report of what results.jsonl in --out holds (of the models named, or all)
    written: bool = False  # answers are written out too, not only compared by likelihood
    cute: Path | None = None  # folder with CUTE's TSV files
    hellaswag: Path | None = None  # HellaSwag's validation set, as JSONL
    misspellings: Path | None = None  # lines `typo->word`: adds a noise
    words: Path | None = None  # text to take words from; none: the text
    parallel: Path | None = None  # folder of LANGUAGE.txt with a sentence a line
    tokenizer: Path | None = None  # tokenized model: texts that its tokens cut wrongly
    morphemes: tuple[Path, ...] = ()  # words cut into morphemes (SIGMORPHON 2022)
    records: tuple[Path, ...] = ()  # questions as JSONL, in llm-foundry's forms
    seed: int = 0  # of noise and of what is drawn
    text: tuple[str, ...] = ()  # files or globs (.txt, .jsonl, .gz, .zst, [a:b] slices)
    text_field: str = "text"  # field of a jsonl record that holds the text
    max_bytes: int = 0  # read at most this much; 0 = all
    window: int = 0  # bytes of context; 0 = min(8192, the trained length)
    task: Literal["spans", "vowels", "context_vowels", "merge", "copy", "pairs"] | None = (
        None  # none: as it was trained
    )
    deletion: Literal["hard", "soft", "none"] | None = None  # how a delete gate deletes; none: hard
    compare: bool = False  # add compressor lines given the run's training text
    reserved: Literal["error", "replace"] | None = None  # bytes the model keeps for itself; none: as it was trained
    config: Path | None = None  # the reference's config JSON, for a bare file of weights
    checkpoint: str = "latest"  # latest, best, or a step
    semantics: Literal["masked", "canonical", "lastfree"] | None = None  # of a tokenized model's bytes; none: masked
    json: bool = False  # print one JSON object


def evaluate_command(args: list[str]) -> int:
    options = tyro.cli(EvalOptions, args=args, prog="bytelm eval")
    if not options.model and not options.report:
        raise ConfigError("bytelm eval: name a model (a run, a checkpoint, a weights directory)")
    for name in ("window", "max_bytes", "passages", "items"):
        if getattr(options, name) < 0:
            raise ConfigError(f"{_option(name)} must not be negative")
    from bytelm.evals.suites import SUITES

    names = [name for name in options.suite.split(",") if name]
    for name in names:
        if name not in SUITES:
            raise ConfigError(f"suite {name!r}: {codec.suggest(name, list(SUITES))}")
    if options.out is None:
        if options.report:
            raise ConfigError("--report needs the folder of the results: --out DIR")
        if len(options.model) > 1 or names not in ([], ["bpb"]):
            raise ConfigError("suites, and several models, need a folder for their results: --out DIR")
        for field in FOR_SUITES:
            if getattr(options, field):
                raise ConfigError(f"{_option(field)} is for suites, which need a folder for their results: --out DIR")
        return _print_bits(options, options.model[0])
    if options.report:
        return _report(options, names, options.out)
    return _run_suites(options, names, options.out)


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _print_bits(options: EvalOptions, path: Path) -> int:
    """Bits per byte of one model."""
    from bytelm.byteview.byte_view import TokenizedLM
    from bytelm.byteview.tokenizer_files import run_tokenizer
    from bytelm.data.pipeline import load_text
    from bytelm.data.sources import open_corpus
    from bytelm.evals.bpb import BitsPerByte, bits_per_byte, first_bytes
    from bytelm.lm import NetworkLM
    from bytelm.protocol import ByteLM
    from bytelm.seq2seq_lm import Seq2SeqLM

    tokens_run = run_tokenizer(path) is not None
    lm = bytelm.load(path, checkpoint=options.checkpoint, reserved=None if tokens_run else options.reserved,
                     config=options.config, deletion=options.deletion, semantics=options.semantics)  # fmt: skip
    if isinstance(lm, Seq2SeqLM):
        return _print_targets(options, path, lm)
    tokenized = isinstance(lm, TokenizedLM)
    if tokenized and options.semantics not in (None, "masked"):
        raise ConfigError(
            f"--semantics {options.semantics}: its scores are no code lengths; bits per byte are of masked"
        )
    if options.task is not None:
        raise ConfigError(f"--task {options.task}: only encoder-decoders have tasks")
    if options.text:
        text, name = open_corpus(options.text, text_field=options.text_field, where="--text"), ", ".join(options.text)
    else:
        text, name = _held_out(path)
    sources = load_text(_run_data(path))[0] if options.compare else []
    window = options.window or lm.window

    replaces = tokens_run and (options.reserved or _run_data(path).reserved) == "replace"

    def read(documents: list[bytes]) -> list[bytes]:
        """As a run of tokens reads them; its bits are over the bytes of the text as it is."""
        return [d.decode(errors="replace").encode() for d in documents] if replaces else documents

    def measure(lm: ByteLM) -> BitsPerByte:
        return bits_per_byte(
            lambda documents: [-s.total for s in lm.score_batch(read(documents), window=window)],
            first_bytes(text, options.max_bytes), window,
        )  # fmt: skip

    result, other = measure(lm), None
    if isinstance(lm, NetworkLM) and isinstance(lm.config, HATConfig):
        other = measure(lm.released())
    record: dict[str, Any] = {
        "model": str(path), "family": lm.config.family if isinstance(lm, NetworkLM) else None,
        "text": name, "bytes": result.bytes, "documents": result.documents, "window": window, "bpb": result.bpb,
    }  # fmt: skip
    lines, tokens = [], None
    if other is not None:
        record |= {"bpb_strict": result.bpb, "bpb_released": other.bpb}
    if isinstance(lm, TokenizedLM):
        tokens = bits_per_byte(
            lambda documents: [-total for total in lm.score_tokens(read(documents))],
            first_bytes(text, options.max_bytes), lm.model.config.context,
        )  # fmt: skip
        record |= {"family": "tokenized", "bpb": tokens.bpb, "bpb_masked": result.bpb}
    if options.compare:
        lines = _compressed(sources, b"".join(first_bytes(text, options.max_bytes)))
        record["compressors"] = {line.name: line.bpb for line in lines}
    if options.compare and not options.text:
        _draw(path, record["compressors"])
    if options.json:
        print(json.dumps(record))
        return EXIT_OK
    print(f"{name}: {result.bytes:,} bytes in {result.documents} document(s), windows of {window}")
    if tokens is not None:
        print(f"  {path}: {tokens.bpb:.4f} bits per byte by its own tokens, {result.bpb:.4f} by the byte view")
    rows = [] if tokens is not None else [(str(path), result.bpb, "this model")]
    rows += [(ln.name, ln.bpb, ln.source) for ln in lines]
    if other is not None:
        print(f"  {path}: {other.bpb:.4f} bits per byte with released guides, which know of a word before its "
              "first character is whole; without:")  # fmt: skip
    for label, bpb, remark in sorted(rows, key=lambda row: row[1]):
        print(f"  {label:<28} {bpb:.4f} bits per byte   {remark}" if remark == "this model" else
              f"  {label:<28} {bpb:.3f}  bits per byte   given the same training text; {remark}")  # fmt: skip
    if options.compare and not any(line.name == "PPMd" for line in lines):
        print("  (no PPMd line: pip install pyppmd to measure it for this text)")
    return EXIT_OK


def _print_targets(options: EvalOptions, path: Path, lm: Any) -> int:
    """Bits per target id, whole targets right, and what the encoder keeps, of an encoder-decoder."""
    from bytelm.data.diagnostics import DIAGNOSTICS
    from bytelm.data.pipeline import load_text
    from bytelm.data.seq2seq import heldout_examples, heldout_rows
    from bytelm.data.sources import open_corpus
    from bytelm.evals.seq2seq import score_targets

    if options.compare or options.window:
        raise ConfigError("--compare and --window are for models that go on with a text")
    data = _stored_data(path)
    run = data is not None
    if data is None:
        if not options.task:
            raise ConfigError(f"{path}: weights alone do not say what they were trained on: give --task")
        data = DataConfig(task=options.task, seq_len=lm.window, batch_size=8)
    if options.task:
        data = dataclasses.replace(data, task=options.task)
    if options.text:
        text, name = open_corpus(options.text, text_field=options.text_field, where="--text"), ", ".join(options.text)
        data = dataclasses.replace(data, valid=options.text)
    elif data.task in DIAGNOSTICS:
        text, name = None, "texts drawn for it"
    elif run:
        text, name = load_text(data)[1], ", ".join(data.valid) or f"held out of {', '.join(data.train)}"
    else:
        raise ConfigError(f"{path} is not a run directory, so its texts are not known: give --text FILE")
    size = max(1, min(data.batch_size, lm.batch_bytes // data.seq_len))
    result = score_targets(lm.report, heldout_rows(heldout_examples(text, data), data, options.max_bytes), size)
    if result is None:
        raise ConfigError(f"{name}: too little text for one example of the task {data.task}")
    record = {"model": str(path), "family": lm.config.family, "task": data.task, "text": name,
              "deletion": lm.deletion if lm.config.deletion.gated else lm.config.deletion.kind,
              "examples": result.examples, "targets": result.bytes, "bits_per_target": result.bpb,
              **{key.removeprefix("heldout_"): value for key, value in result.more().items()}}  # fmt: skip
    if options.json:
        print(json.dumps(record))
        return EXIT_OK
    print(
        f"{data.task}, {name}: {result.examples:,} examples, {result.bytes:,} target ids, deletion {record['deletion']}"
    )
    print(f"  {result.bpb:.4f} bits per target id   whole targets right {record['sequence_accuracy']:.2%}   "
          f"ids right {record['accuracy']:.2%}")  # fmt: skip
    print(f"  encoder: {record['deleted']:.1%} deleted; the longest row of a batch keeps {record['longest']:.1%}")
    return EXIT_OK


def _stored_data(path: Path) -> DataConfig | None:
    """The data settings of a run directory or one of its checkpoints; None for weights alone."""
    from bytelm.checkpoint import read_meta, stored_config

    if (path / "config.yaml").exists():
        return codec.load(path / "config.yaml").data
    return stored_config(read_meta(path), str(path)).data if (path / "meta").is_dir() else None


def _run_data(run: Path) -> DataConfig:
    """The data settings of a run directory."""
    if not (run / "config.yaml").exists():
        raise ConfigError(f"{run} is not a run directory, so its texts are not known: give --text FILE, no --compare")
    return codec.load(run / "config.yaml").data


def _held_out(run: Path) -> tuple[Any, str]:
    """The text that a run held out, and what it is called."""
    from bytelm.data.pipeline import load_text

    data = _run_data(run)
    text = load_text(data)[1]
    if len(text) == 0:
        raise ConfigError(f"{run}: the run held out no text: give --text FILE")
    return text, ", ".join(data.valid) or f"held out of {', '.join(data.train)}"


def _compressed(sources: list, test: bytes) -> list:
    """Compressor lines for a text, given a run's training text."""
    from bytelm.evals.compressors import ppmd_given, xz_given

    size = sum(s.total_bytes for s in sources)
    if size > COMPARE_LIMIT:
        raise ConfigError(
            f"--compare would compress {size:,} bytes of training text; it takes {COMPARE_LIMIT:,} at most"
        )
    train = b"".join(s.read(i) for s in sources for i in range(len(s)))
    return [line for line in (xz_given(train, test), ppmd_given(train, test)) if line]


def _sizes(options: EvalOptions) -> Any:
    from bytelm.evals.suites import Sizes

    own = {name: value for name in ("passages", "items") if (value := getattr(options, name))}
    return dataclasses.replace(Sizes.full() if options.full else Sizes(), **own)


def _run_suites(options: EvalOptions, names: list[str], out: Path) -> int:
    """Suites over models, with a report."""
    from rich.console import Console

    from bytelm.byteview.tokenizer_files import run_tokenizer
    from bytelm.data.pipeline import load_text
    from bytelm.data.sources import open_corpus
    from bytelm.evals import suites
    from bytelm.evals.results import Results
    from bytelm.evals.runner import facts, keep_facts, run_units

    for field in FOR_ONE:
        if getattr(options, field):
            raise ConfigError(
                f"{_option(field)} is for one figure of one model; suites (--out) have sizes of their own"
            )
    if len({path.resolve() for path in options.model}) < len(options.model):
        raise ConfigError("a model is named twice")
    given = (options.cute, options.hellaswag, options.misspellings, options.words, options.parallel, options.tokenizer)
    for path in (*options.model, *(path for path in given if path is not None), *options.morphemes, *options.records):
        if not path.exists():
            raise ConfigError(f"{path}: no such file or directory")
    if options.semantics not in (None, "masked"):
        raise ConfigError(f"--semantics {options.semantics}: its scores are no code lengths; suites are of masked")
    several = {"--deletion": options.deletion, "--config": options.config, "--semantics": options.semantics}
    if len(options.model) > 1 and any(several.values()):
        one = next(option for option, value in several.items() if value)
        raise ConfigError(f"{one} is for one kind of model: evaluate that model alone, into the same --out")
    name = ", ".join(options.text) or f"held out by {options.model[0]}"

    def text() -> Any:
        if options.text:
            return open_corpus(options.text, text_field=options.text_field, where="--text")
        return _held_out(options.model[0])[0]

    material = suites.Material(
        text=text, cute=options.cute, hellaswag=options.hellaswag, misspellings=options.misspellings,
        words=options.words, parallel=options.parallel, tokenizer=options.tokenizer, morphemes=options.morphemes,
        records=options.records, seed=options.seed, sizes=_sizes(options),
    )  # fmt: skip
    console = Console(highlight=False, stderr=options.json)
    left_out = lambda why: console.print(f"left out: {why}", markup=False)  # noqa: E731
    wanted = names or [s for s in suites.SUITES if s not in suites.NEEDS or getattr(options, suites.NEEDS[s])]
    units = [suites.SIZE, *suites.units(wanted, material, options.written, None if names else left_out)]
    results = Results(out)
    lines: dict[str, float] = {}
    if options.compare:
        sources = load_text(_run_data(options.model[0]))[0]
        lines = {
            c.name: c.bpb for c in _compressed(sources, b"".join(material.documents("bpb", material.sizes.bpb_bytes)))
        }

    def load(path: Path) -> Any:
        reserved = None if run_tokenizer(path) else options.reserved  # tokens take every byte
        return bytelm.load(path, checkpoint=options.checkpoint, reserved=reserved, config=options.config,
                           deletion=options.deletion, semantics=options.semantics)  # fmt: skip

    decides = {"checkpoint": options.checkpoint, "reserved": options.reserved, "deletion": options.deletion,
               "semantics": options.semantics, "config": suites.file_content(options.config)}  # fmt: skip
    try:
        found, failed = run_units(options.model, load, decides, units, results, console)
    except KeyboardInterrupt:
        console.print(f"stopped; what is done stands in {results.path}: the same command goes on", markup=False)
        return EXIT_INTERRUPTED
    if not found:
        raise ConfigError("; ".join(failed))
    about = facts(options.model, name, wanted, material)
    keep_facts(out, about, lines, units)
    _show(options, found, lines, about, out, console)
    left = [f"{s} (--{field})" for s, field in suites.NEEDS.items() if s not in wanted]
    if left and not names and not options.json:
        console.print(f"left out, for want of their files: {', '.join(left)}", markup=False)
    if failed:
        console.print("not done (the same command tries again):", *failed, sep="\n  ", markup=False)
    return EXIT_CHECK_FAILED if failed else EXIT_OK


def _report(options: EvalOptions, names: list[str], out: Path) -> int:
    """A report of the results in a folder; nothing is run, no model or text is needed."""
    from rich.console import Console

    from bytelm.evals.results import Results
    from bytelm.evals.runner import kept_facts, names_of

    if not (out / "results.jsonl").exists():
        raise ConfigError(f"--report: {out} holds no results.jsonl")
    wanted = ["model", *names, *(f"{name}-written" for name in names)]
    kept = kept_facts(out)
    models = {name for path in options.model for name in (*names_of([path]), str(path))}
    found = Results(out).latest(kept.get("sets", {}), models)
    found = [result for result in found if not names or result.suite in wanted]
    if all(result.suite == "model" for result in found):
        raise ConfigError(f"--report: {out / 'results.jsonl'} has no results of these models and suites")
    _show(options, found, kept.get("lines", {}), kept.get("facts", {}), out, Console(highlight=False))
    return EXIT_OK


def _show(
    options: EvalOptions, found: list, lines: dict[str, float], about: dict[str, str], out: Path, console: Any
) -> None:
    """Writes the report and prints its headline, or every figure as JSON."""
    from bytelm.evals.report import write_report
    from bytelm.evals.runner import headline
    from bytelm.evals.summary import Summary

    summary = Summary(found, lines)
    report = write_report(summary, out, "Evaluation of byte language models", about)
    if options.json:
        print(json.dumps(summary.record()))
        return
    for table in headline(summary, console.width):
        console.print(table)
    console.print(f"{report}   {out / 'results.jsonl'}", markup=False)


def _draw(run: Path, lines: dict[str, float]) -> None:
    """Draws the run's loss plot again, with the compressor lines."""
    from bytelm.metrics import plot_losses

    with contextlib.suppress(OSError):  # a run that may not be written to keeps its plot
        plot_losses(run / "metrics.jsonl", run / "loss.png", lines)
