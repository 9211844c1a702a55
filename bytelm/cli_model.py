"""Commands about one model: chunks, convert, parity. Each returns an exit status."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import bytelm
from bytelm.config import ConfigError, TokensConfig
from bytelm.vocab import complete_prefix

EXIT_OK, EXIT_CHECK_FAILED = 0, 1

PathArgument = tyro.conf.Positional[Path]


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
    from bytelm.byteview.tokenizer_files import vocabulary_in
    from bytelm.interop.published import is_model, open_model, save_hf, save_hnet
    from bytelm.interop.trained_tokens import save_token_lm
    from bytelm.interop.weights import save_weights
    from bytelm.lm import load_run, trained_tokenizer

    options = tyro.cli(ConvertOptions, args=args, prog="bytelm convert")
    if options.target.exists() and any(options.target.iterdir() if options.target.is_dir() else [options.target]):
        raise ConfigError(f"{options.target} is there and not empty: name a new folder")
    if options.config is not None or is_model(options.source):
        stored = open_model(options.source, options.config)
        model, params, context = stored.config, stored.read(), stored.context
    else:
        config, params = load_run(options.source, options.checkpoint)
        model, context = config.model, config.data.seq_len
    if isinstance(model, TokensConfig):
        if options.to == "hnet":
            raise ConfigError("--to hnet: a model of tokens is no H-Net")
        file = trained_tokenizer(options.source, options.checkpoint)
        vocabulary = vocabulary_in(file)
        assert vocabulary.start is not None
        save_token_lm(options.target, file, vocabulary.start, vocabulary.ends[0], model, params, context, options.dtype)
    elif options.to == "hnet":
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
