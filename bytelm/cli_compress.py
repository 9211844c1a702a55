"""Commands that put a text into as few bytes as a model needs, and get it back."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

import bytelm
from bytelm.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """Compresses a file with a model, which is needed again to get it back: the same weights on the same kind of
    machine and versions. About a thousand bytes a second with a small model."""

    model: tyro.conf.Positional[Path]  # run, checkpoint, weights directory, or tokenized model
    file: tyro.conf.Positional[Path]  # any file
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # none: FILE.bytelm
    force: bool = False  # write over a file that is there
    checkpoint: str = "latest"  # latest, best, or a step


@dataclass(frozen=True, kw_only=True)
class DecompressOptions:
    """Gets a file back that `bytelm compress` wrote. Nothing is left behind where it cannot."""

    model: tyro.conf.Positional[Path]  # the model that it was compressed with
    file: tyro.conf.Positional[Path]  # what compress wrote
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # none: FILE without .bytelm
    force: bool = False  # write over a file that is there
    checkpoint: str = "latest"  # latest, best, or a step


def compress_command(args: list[str]) -> int:
    from bytelm.coding import compress

    options = tyro.cli(CompressOptions, args=args, prog="bytelm compress")
    text = options.file.read_bytes()
    out = options.out or options.file.with_name(options.file.name + ".bytelm")
    _may_write(out, options.force)
    lm, began = bytelm.load(options.model, checkpoint=options.checkpoint), time.perf_counter()
    code = compress(lm, text)
    _write(out, code)
    bits = 8 * len(code) / len(text) if text else 0.0
    print(f"{out}: {len(text):,} bytes as {len(code):,}, {bits:.3f} bits per byte, "
          f"{len(text) / (time.perf_counter() - began):,.0f} bytes/s")  # fmt: skip
    return 0


def decompress_command(args: list[str]) -> int:
    from bytelm.coding import decompress

    options = tyro.cli(DecompressOptions, args=args, prog="bytelm decompress")
    code = options.file.read_bytes()
    out = options.out or options.file.with_suffix("")
    if options.out is None and options.file.suffix != ".bytelm":
        raise ConfigError(f"{options.file} does not end in .bytelm: name the file to write with --out")
    _may_write(out, options.force)
    _write(out, text := decompress(bytelm.load(options.model, checkpoint=options.checkpoint), code))
    print(f"{out}: {len(text):,} bytes")
    return 0


def _may_write(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise ConfigError(f"{out} is there; --force writes over it")


def _write(out: Path, data: bytes) -> None:
    """The whole file, or none."""
    temporary = out.with_name(out.name + ".tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
