"""The command that lets a model write: sample. Returns an exit status."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

import bytelm
from bytelm.config import ConfigError
from bytelm.vocab import complete_prefix

EXIT_OK = 0

PathArgument = tyro.conf.Positional[Path]


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Lets a model write; the text streams as it is made."""

    model: PathArgument  # run, checkpoint or weights directory
    prompt: str = ""  # text to go on from; empty = the start of a document
    prompt_file: Path | None = None  # read the prompt (any bytes) from this file instead
    input: str | None = None  # what an encoder-decoder reads; the prompt is then the start of its target
    beams: int = 1  # encoder-decoders: the best target by a search with so many beams, instead of a drawn one
    max_bytes: int = 400  # length of the continuation
    temperature: float = 0.8  # 0 = always the most probable byte
    top_k: int = 0  # only the k most probable bytes; 0 = all
    top_p: float = 0.95  # only the most probable bytes that together reach this probability
    stop: tuple[str, ...] = ()  # end in front of any of these
    seed: int = 0  # same seed, same text
    count: int = 1  # how many continuations
    reserved: Literal["error", "replace"] | None = None  # bytes the model keeps for itself; none: as it was trained
    config: Path | None = None  # the reference's config JSON, for a bare file of weights
    checkpoint: str = "latest"  # latest, best, or a step
    semantics: Literal["masked", "canonical", "lastfree", "all"] | None = None  # a tokenized model's; none: masked
    explain: bool = False  # a tokenized model: what it says next, with the prompt's tokens fixed and by the byte view
    special: bool = False  # a tokenized model: what spells a special token in the prompt is that token
    chat: bool = False  # a tokenized model: the prompt is a message, which it answers
    suffix: str | None = None  # a tokenized model made for it: fill in between the prompt and this
    by_tokens: bool = False  # a tokenized model: temperature, top_k and top_p are of tokens, not of bytes
    draft: Literal["none", "copy", "own", "heads"] = "none"  # guess next bytes, verify several at once: copied from the
    # text, by a chunk model's own decoder, or by heads for further bytes; the same bytes, but where rounding decides
    slide: bool = False  # a tokenized model: go on beyond its context, with the oldest text forgotten


def sample(args: list[str]) -> int:
    options = tyro.cli(SampleOptions, args=args, prog="bytelm sample")
    prompt = (
        options.prompt_file.read_bytes() if options.prompt_file else options.prompt.encode("utf-8", "surrogateescape")
    )
    lm = bytelm.load(options.model, checkpoint=options.checkpoint, reserved=options.reserved, config=options.config,
                     semantics=options.semantics, draft=options.draft,
                     long_text="slide" if options.slide else "refuse")  # fmt: skip
    source = None if options.input is None else options.input.encode("utf-8", "surrogateescape")
    if options.explain or options.special or options.chat or options.suffix is not None or options.by_tokens:
        return _sample_tokenized(lm, options, prompt)
    if options.beams != 1:
        return _search(lm, options, source, prompt)
    _write_samples(options, lambda **settings: lm.stream(prompt, input=source, **settings), before=prompt)
    return EXIT_OK


def _write_samples(options: SampleOptions, stream: Any, before: bytes = b"", after: bytes = b"") -> None:
    """Writes the samples as they come, each between two texts; `stream` gives the pieces of one."""
    out = sys.stdout.buffer
    settings: dict[str, Any] = {name: getattr(options, name) for name in ("max_bytes", "temperature", "top_k", "top_p")}
    settings["stop"] = tuple(stop.encode("utf-8", "surrogateescape") for stop in options.stop)
    for i in range(options.count):
        if options.count > 1:
            out.write(f"--- {i + 1} ---\n".encode())
        out.write(before[: complete_prefix(before)])
        pending = before[complete_prefix(before) :]
        for piece in stream(seed=options.seed + i, **settings):
            out.write(pending + piece)
            pending = b""
            out.flush()
        out.write(pending + after + b"\n")
        out.flush()


def _sample_tokenized(lm: Any, options: SampleOptions, prompt: bytes) -> int:
    from bytelm.byteview.byte_view import TokenizedLM
    from bytelm.byteview.explain import explain, table
    from bytelm.byteview.prompts import chat, fill_in, with_special

    if not isinstance(lm, TokenizedLM):
        raise ConfigError("--explain, --special, --chat, --suffix and --by-tokens are for tokenized models; this one "
                          "reads bytes")  # fmt: skip
    if options.input is not None or options.beams != 1:
        raise ConfigError("--input and --beams are for encoder-decoders")
    if options.special + options.chat + (options.suffix is not None) > 1:
        raise ConfigError("--special, --chat, --suffix: one of them")
    before, after = prompt, (options.suffix or "").encode("utf-8", "surrogateescape")
    if options.chat:
        if complete_prefix(prompt) < len(prompt) or "\ufffd" in prompt.decode(errors="replace"):
            raise ConfigError("--chat: the message is no UTF-8")
        lm, prompt, before = chat(lm, [{"role": "user", "content": prompt.decode()}]), b"", b""
    elif options.special:
        lm, prompt = with_special(lm, prompt), b""
    elif options.suffix is not None:
        lm, prompt = fill_in(lm, prompt, after), b""
    if options.explain:
        print(table(explain(lm, prompt)))
    elif options.by_tokens:
        _write_samples(options, lambda **settings: lm.generate_tokens([prompt], **settings), before, after)
    else:
        _write_samples(options, lambda **settings: lm.stream(prompt, **settings), before, after)
    return EXIT_OK


def _search(lm: Any, options: SampleOptions, source: bytes | None, prompt: bytes) -> int:
    from bytelm.seq2seq_lm import Seq2SeqLM

    if not isinstance(lm, Seq2SeqLM) or source is None or prompt or options.stop or options.count != 1:
        raise ConfigError("--beams needs an encoder-decoder and its --input, and takes no --prompt, --stop or --count")
    ((text, score),) = lm.beam_search([source], options.max_bytes, beams=options.beams)
    sys.stdout.buffer.write(text + b"\n")
    print(f"ln p / length = {score:.4f}", file=sys.stderr)
    return EXIT_OK
