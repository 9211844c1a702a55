"""Commands about one model: eval, chunks, convert, parity. Each returns an exit status."""

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import bytelm
from bytelm import codec
from bytelm.config import ConfigError, DataConfig, HATConfig
from bytelm.vocab import complete_prefix

EXIT_OK, EXIT_CHECK_FAILED = 0, 1
COMPARE_LIMIT = 256 << 20  # bytes of training text that --compare is willing to compress

PathArgument = tyro.conf.Positional[Path]


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Measures a model. Without --text, on the text its run held out; an encoder-decoder on its task's examples."""

    model: PathArgument  # run, checkpoint or weights directory
    suite: Literal["bpb"] = "bpb"  # what to measure: bits per byte
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


def evaluate(args: list[str]) -> int:
    from bytelm.byteview.byte_view import TokenizedLM
    from bytelm.data.pipeline import load_text
    from bytelm.data.sources import open_corpus
    from bytelm.evals.bpb import BitsPerByte, bits_per_byte, first_bytes
    from bytelm.evals.compressors import ppmd_given, xz_given
    from bytelm.lm import NetworkLM
    from bytelm.protocol import ByteLM
    from bytelm.seq2seq_lm import Seq2SeqLM

    options = tyro.cli(EvalOptions, args=args, prog="bytelm eval")
    if options.window < 0 or options.max_bytes < 0:
        raise ConfigError("--window and --max-bytes must not be negative")
    lm = bytelm.load(options.model, checkpoint=options.checkpoint, reserved=options.reserved, config=options.config,
                     deletion=options.deletion, semantics=options.semantics)  # fmt: skip
    if isinstance(lm, Seq2SeqLM):
        return _evaluate_targets(options, lm)
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
        data = _run_data(options.model)
        text = load_text(data)[1]
        name = ", ".join(data.valid) or f"held out of {', '.join(data.train)}"
        if len(text) == 0:
            raise ConfigError(f"{options.model}: the run held out no text: give --text FILE")
    sources = load_text(_run_data(options.model))[0] if options.compare else []
    window = options.window or lm.window

    def measure(lm: ByteLM) -> BitsPerByte:
        return bits_per_byte(
            lambda documents: [-s.total for s in lm.score_batch(documents, window=window)],
            first_bytes(text, options.max_bytes), window,
        )  # fmt: skip

    result, other = measure(lm), None
    if isinstance(lm, NetworkLM) and isinstance(lm.config, HATConfig):
        other = measure(lm.released())
    record: dict[str, Any] = {
        "model": str(options.model), "family": lm.config.family if isinstance(lm, NetworkLM) else None,
        "text": name, "bytes": result.bytes, "documents": result.documents, "window": window, "bpb": result.bpb,
    }  # fmt: skip
    lines, tokens = [], None
    if other is not None:
        record |= {"bpb_strict": result.bpb, "bpb_released": other.bpb}
    if isinstance(lm, TokenizedLM):
        tokens = bits_per_byte(
            lambda documents: [-total for total in lm.score_tokens(documents)],
            first_bytes(text, options.max_bytes), lm.model.config.context,
        )  # fmt: skip
        record |= {"family": "tokenized", "bpb": tokens.bpb, "bpb_masked": result.bpb}
    if options.compare:
        size = sum(s.total_bytes for s in sources)
        if size > COMPARE_LIMIT:
            raise ConfigError(
                f"--compare would compress {size:,} bytes of training text; it takes {COMPARE_LIMIT:,} at most"
            )
        train = b"".join(s.read(i) for s in sources for i in range(len(s)))
        test = b"".join(first_bytes(text, options.max_bytes))
        lines = [line for line in (xz_given(train, test), ppmd_given(train, test)) if line]
        record["compressors"] = {line.name: line.bpb for line in lines}
    if options.compare and not options.text:
        _draw(options.model, record["compressors"])
    if options.json:
        print(json.dumps(record))
        return EXIT_OK
    print(f"{name}: {result.bytes:,} bytes in {result.documents} document(s), windows of {window}")
    if tokens is not None:
        print(f"  {options.model}: {tokens.bpb:.4f} bits per byte by its own tokens, {result.bpb:.4f} by the byte view")
        return EXIT_OK
    rows = [(str(options.model), result.bpb, "this model"), *((ln.name, ln.bpb, ln.source) for ln in lines)]
    if other is not None:
        print(f"  {options.model}: {other.bpb:.4f} bits per byte with released guides, which know of a word before its "
              "first character is whole; without:")  # fmt: skip
    for label, bpb, remark in sorted(rows, key=lambda row: row[1]):
        print(f"  {label:<28} {bpb:.4f} bits per byte   {remark}" if remark == "this model" else
              f"  {label:<28} {bpb:.3f}  bits per byte   given the same training text; {remark}")  # fmt: skip
    if options.compare and not any(line.name == "PPMd" for line in lines):
        print("  (no PPMd line: pip install pyppmd to measure it for this text)")
    return EXIT_OK


def _evaluate_targets(options: EvalOptions, lm: Any) -> int:
    """Bits per target id, whole targets right, and what the encoder keeps, of an encoder-decoder."""
    from bytelm.data.diagnostics import DIAGNOSTICS
    from bytelm.data.pipeline import load_text
    from bytelm.data.seq2seq import heldout_examples, heldout_rows
    from bytelm.data.sources import open_corpus
    from bytelm.evals.seq2seq import score_targets

    if options.compare or options.window:
        raise ConfigError("--compare and --window are for models that go on with a text")
    data = _stored_data(options.model)
    run = data is not None
    if data is None:
        if not options.task:
            raise ConfigError(f"{options.model}: weights alone do not say what they were trained on: give --task")
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
        raise ConfigError(f"{options.model} is not a run directory, so its texts are not known: give --text FILE")
    size = max(1, min(data.batch_size, lm.batch_bytes // data.seq_len))
    result = score_targets(lm.report, heldout_rows(heldout_examples(text, data), data, options.max_bytes), size)
    if result is None:
        raise ConfigError(f"{name}: too little text for one example of the task {data.task}")
    record = {"model": str(options.model), "family": lm.config.family, "task": data.task, "text": name,
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


def _draw(run: Path, lines: dict[str, float]) -> None:
    """Draws the run's loss plot again, with the compressor lines."""
    from bytelm.metrics import plot_losses

    with contextlib.suppress(OSError):  # a run that may not be written to keeps its plot
        plot_losses(run / "metrics.jsonl", run / "loss.png", lines)


@dataclass(frozen=True, kw_only=True)
class ChunksOptions:
    """Shows how a chunking model cuts a text, or which bytes a deleting one drops: in colours, with figures, or as an
    HTML page."""

    model: PathArgument  # run, checkpoint or weights directory, or a published checkpoint
    text: str = ""  # the text
    file: Path | None = None  # read it (any bytes) from this file instead
    max_bytes: int = 2000  # of the file; 0 = all
    html: Path | None = None  # write a page with a hover card for every character
    json: bool = False  # print boundaries and probabilities as one JSON object
    reserved: Literal["error", "replace"] | None = None  # bytes the model keeps for itself; none: as it was trained
    config: Path | None = None  # the reference's config JSON, for a bare file of weights
    checkpoint: str = "latest"  # latest, best, or a step


def chunks(args: list[str]) -> int:
    from rich.console import Console

    from bytelm.evals.chunk_page import Snapshot, chunk_page
    from bytelm.evals.chunk_view import print_chunks
    from bytelm.evals.kept_view import kept_page, print_kept
    from bytelm.seq2seq_lm import Seq2SeqLM

    options = tyro.cli(ChunksOptions, args=args, prog="bytelm chunks")
    text = options.text.encode("utf-8", "surrogateescape")
    if options.file is not None:
        if text:
            raise ConfigError("give --text or --file, not both")
        text = options.file.read_bytes()
        if 0 < options.max_bytes < len(text):
            text = text[: options.max_bytes]
            text = text[: complete_prefix(text)]
    if not text:
        raise ConfigError("no text to cut: give --text TEXT or --file FILE")
    lm = bytelm.load(options.model, checkpoint=options.checkpoint, reserved=options.reserved, config=options.config)
    levels = lm.boundaries(text)
    if not levels:
        raise ConfigError(f"{options.model}: this model reads bytes one by one; it has no chunks")
    deletes = isinstance(lm, Seq2SeqLM) and lm.config.deletion.gated
    if options.html is not None and deletes:
        options.html.write_text(kept_page(text, levels[0], f"Bytes kept by {options.model}"), encoding="utf-8")
        print(options.html)
    elif options.html is not None:
        page = chunk_page(text, [Snapshot("", levels)], f"Chunks of {options.model}")
        options.html.write_text(page, encoding="utf-8")
        print(options.html)
    elif options.json:
        print(json.dumps([{"offset": level.offset.tolist(), "probability": level.probability.tolist(),
                           "cut": level.cut.tolist()} for level in levels]))  # fmt: skip
    elif deletes:
        print_kept(text, levels[0], Console(highlight=False))
    else:
        print_chunks(text, levels, Console(highlight=False))
    return EXIT_OK


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Writes a model's weights as safetensors + config.json, which `bytelm.load` reads back."""

    source: PathArgument  # run, checkpoint, weights directory, or a published checkpoint (folder or .pt file)
    target: PathArgument  # new folder
    to: Literal["bytelm", "hnet", "hf"] = "bytelm"  # format: ours, H-Net's, or transformers' (ByT5, MrT5)
    config: Path | None = None  # the reference's config JSON, for a bare file of weights
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the stored tensors
    checkpoint: str = "latest"  # latest, best, or a step


def convert(args: list[str]) -> int:
    from bytelm.interop.published import is_model, open_model, save_hf, save_hnet
    from bytelm.interop.weights import save_weights
    from bytelm.lm import load_run

    options = tyro.cli(ConvertOptions, args=args, prog="bytelm convert")
    if options.target.exists() and any(options.target.iterdir() if options.target.is_dir() else [options.target]):
        raise ConfigError(f"{options.target} is there and not empty: name a new folder")
    if options.config is not None or is_model(options.source):
        stored = open_model(options.source, options.config)
        model, params, context = stored.config, stored.read(), stored.context
    else:
        config, params = load_run(options.source, options.checkpoint)
        model, context = config.model, config.data.seq_len
    if options.to == "hnet":
        save_hnet(options.target, model, params, options.dtype)
    elif options.to == "hf":
        save_hf(options.target, model, params, options.dtype)
    else:
        save_weights(options.target, model, params, context, options.dtype)
    print(f"{options.target}: config.json, model.safetensors ({options.dtype})")
    return EXIT_OK


def parity(args: list[str]) -> int:
    from bytelm.interop.parity import run_case

    @dataclass(frozen=True, kw_only=True)
    class ParityOptions:
        """Runs a saved reference case on this machine's device and compares; exit status 1 when it is not ok."""

        case: PathArgument  # directory with config.json, weights.safetensors, io.safetensors
        precision: Annotated[str, tyro.conf.arg(help="matmul precision: highest, high, default")] = "highest"

    options = tyro.cli(ParityOptions, args=args, prog="bytelm parity")
    record = run_case(options.case, options.precision)
    print(json.dumps(record))
    return EXIT_OK if record["ok"] else EXIT_CHECK_FAILED
