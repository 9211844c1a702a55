"""The `bytelm` command. User mistakes end in one message and exit status 2, never in a traceback."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import bytelm
from bytelm import codec
from bytelm.config import Config, ConfigError, DataConfig
from bytelm.vocab import complete_prefix

EXIT_OK, EXIT_CHECK_FAILED, EXIT_USER_ERROR, EXIT_DIVERGED, EXIT_INTERRUPTED = 0, 1, 2, 3, 75

USAGE = """usage: bytelm COMMAND ...

  train   CONFIG.yaml [--section.field value ...] [--dry-run]   train a model, or go on with a run (its folder)
  eval    RUN [--suite bpb] [--text FILE ...] [--compare]       measure a model
  sample  RUN --prompt TEXT                                     let a model write
  convert RUN DST                                               write weights as safetensors + config.json
  parity  CASE_DIR                                              does this machine still give the reference numbers?
  plan    CONFIG.yaml [--devices N] [--chip h100]               parameters, FLOPs and memory, before anything runs

  bytelm COMMAND --help says more; bytelm --version prints the version."""

COMPARE_LIMIT = 256 << 20  # bytes of training text that --compare is willing to compress

PathArgument = tyro.conf.Positional[Path]


def read_config(source: str, overrides: Sequence[str], prog: str) -> Config:
    """A config file or a run's folder, with command-line overrides such as --train.steps 100."""
    path = Path(source)
    if path.is_dir():
        stored = path / "config.yaml"
        if not stored.exists():
            raise ConfigError(f"{path}: a folder without config.yaml; give a config file or the folder of a run")
        config = codec.load(stored)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=str(path)))
    else:
        config = codec.load(path)
    return tyro.cli(
        Config, default=config, args=list(overrides), prog=f"{prog} {source}", config=(tyro.conf.AvoidSubcommands,)
    )


def _config_command(args: list[str], name: str, doc: str) -> tuple[str, list[str]]:
    """Splits CONFIG from the options behind it; help without a CONFIG shows every field with its default."""
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: bytelm {name} CONFIG.yaml|RUN_DIR [--section.field value ...]\n\n{doc}\n")
        if args:
            tyro.cli(Config, default=Config(), args=["--help"], prog=f"bytelm {name} CONFIG.yaml")
        raise SystemExit(EXIT_USER_ERROR)
    if args[0].startswith("-"):
        raise ConfigError(f"bytelm {name}: the config file or run folder comes first, before {args[0]}")
    return args[0], args[1:]


def _take_flag(args: list[str], flag: str) -> tuple[bool, list[str]]:
    return flag in args, [a for a in args if a != flag]


def _take_option(args: list[str], option: str, default: str) -> tuple[str, list[str]]:
    rest, value = [], default
    items = iter(args)
    for item in items:
        if item == option:
            value = next(items, None)
            if value is None:
                raise ConfigError(f"{option} needs a value")
        elif item.startswith(option + "="):
            value = item.split("=", 1)[1]
        else:
            rest.append(item)
    return value, rest


def train(args: list[str]) -> int:
    """Trains a model. --dry-run checks config, data and mesh, prints the plan and stops."""
    source, rest = _config_command(args, "train", train.__doc__ or "")
    dry, rest = _take_flag(rest, "--dry-run")
    config = read_config(source, rest, "bytelm train")
    if dry:
        return _dry_run(config)
    from bytelm.train.loop import train as run

    run(config)
    return EXIT_OK


def _dry_run(config: Config) -> int:
    import jax

    from bytelm.data.pipeline import load_text
    from bytelm.parallel.mesh import make_mesh
    from bytelm.plan import describe_plan, make_plan
    from bytelm.train.state import plan_state

    mesh = make_mesh(config.mesh)
    sources, heldout = load_text(config.data)
    with jax.set_mesh(mesh):
        plan_state(config, mesh)
    print(codec.dumps(config))
    print(describe_plan(config, make_plan(config, mesh.size)))
    print(f"\ntraining text: {' + '.join(s.describe() for s in sources)}; held out: {heldout.describe()}")
    print("dry run: nothing was trained or written")
    return EXIT_OK


def plan(args: list[str]) -> int:
    """Prints parameters by part, useful FLOPs per byte and memory per device. Nothing is allocated.

    --devices N: plan for N devices; --chip NAME: compare with a chip (v5p, v6e, h100, h200 ...); --json: as JSON."""
    from bytelm.plan import describe_plan, make_plan, to_json

    source, rest = _config_command(args, "plan", plan.__doc__ or "")
    as_json, rest = _take_flag(rest, "--json")
    devices, rest = _take_option(rest, "--devices", "0")
    chip, rest = _take_option(rest, "--chip", "")
    if not (devices.isascii() and devices.isdecimal()):
        raise ConfigError(f"--devices {devices}: must be a whole number")
    config = read_config(source, rest, "bytelm plan")
    made = make_plan(config, int(devices), chip)
    print(json.dumps(to_json(made)) if as_json else describe_plan(config, made))
    return EXIT_OK


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Lets a model write; the text streams as it is made."""

    model: PathArgument  # run, checkpoint or weights directory
    prompt: str = ""  # text to go on from; empty = the start of a document
    prompt_file: Path | None = None  # read the prompt (any bytes) from this file instead
    max_bytes: int = 400  # length of the continuation
    temperature: float = 0.8  # 0 = always the most probable byte
    top_k: int = 0  # only the k most probable bytes; 0 = all
    top_p: float = 0.95  # only the most probable bytes that together reach this probability
    stop: tuple[str, ...] = ()  # end in front of any of these
    seed: int = 0  # same seed, same text
    count: int = 1  # how many continuations
    checkpoint: str = "latest"  # latest, best, or a step


def sample(args: list[str]) -> int:
    options = tyro.cli(SampleOptions, args=args, prog="bytelm sample")
    prompt = (
        options.prompt_file.read_bytes() if options.prompt_file else options.prompt.encode("utf-8", "surrogateescape")
    )
    lm = bytelm.load(options.model, checkpoint=options.checkpoint)
    out = sys.stdout.buffer
    settings: dict[str, Any] = {name: getattr(options, name) for name in ("max_bytes", "temperature", "top_k", "top_p")}
    settings["stop"] = tuple(stop.encode("utf-8", "surrogateescape") for stop in options.stop)
    for i in range(options.count):
        if options.count > 1:
            out.write(f"--- {i + 1} ---\n".encode())
        out.write(prompt[: complete_prefix(prompt)])
        pending = prompt[complete_prefix(prompt) :]
        for piece in lm.stream(prompt, seed=options.seed + i, **settings):
            out.write(pending + piece)
            pending = b""
            out.flush()
        out.write(pending + b"\n")
        out.flush()
    return EXIT_OK


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Measures a model. Without --text, on the text its run held out."""

    model: PathArgument  # run, checkpoint or weights directory
    suite: Literal["bpb"] = "bpb"  # what to measure: bits per byte
    text: tuple[str, ...] = ()  # files or globs (.txt, .jsonl, .gz, .zst, [a:b] slices)
    text_field: str = "text"  # field of a jsonl record that holds the text
    max_bytes: int = 0  # read at most this much; 0 = all
    window: int = 0  # bytes of context; 0 = min(8192, the trained length)
    compare: bool = False  # add compressor lines given the run's training text
    checkpoint: str = "latest"  # latest, best, or a step
    json: bool = False  # print one JSON object


def evaluate(args: list[str]) -> int:
    from bytelm.data.pipeline import load_text
    from bytelm.data.sources import open_corpus
    from bytelm.evals.bpb import bits_per_byte, first_bytes
    from bytelm.evals.compressors import ppmd_given, xz_given
    from bytelm.lm import NetworkLM

    options = tyro.cli(EvalOptions, args=args, prog="bytelm eval")
    if options.window < 0 or options.max_bytes < 0:
        raise ConfigError("--window and --max-bytes must not be negative")
    lm = bytelm.load(options.model, checkpoint=options.checkpoint)
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
    result = bits_per_byte(
        lambda documents: [-s.total for s in lm.score_batch(documents, window=window)],
        first_bytes(text, options.max_bytes),
        window,
    )
    record: dict[str, Any] = {
        "model": str(options.model), "family": lm.config.family if isinstance(lm, NetworkLM) else None,
        "text": name, "bytes": result.bytes, "documents": result.documents, "window": window, "bpb": result.bpb,
    }  # fmt: skip
    lines = []
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
    rows = [(str(options.model), result.bpb, "this model"), *((ln.name, ln.bpb, ln.source) for ln in lines)]
    for label, bpb, remark in sorted(rows, key=lambda row: row[1]):
        print(f"  {label:<28} {bpb:.4f} bits per byte   {remark}" if remark == "this model" else
              f"  {label:<28} {bpb:.3f}  bits per byte   given the same training text; {remark}")  # fmt: skip
    if options.compare and not any(line.name == "PPMd" for line in lines):
        print("  (no PPMd line: pip install pyppmd to measure it for this text)")
    return EXIT_OK


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
class ConvertOptions:
    """Writes a model's weights as safetensors + config.json, which `bytelm.load` reads back."""

    source: PathArgument  # run, checkpoint or weights directory
    target: PathArgument  # new folder
    to: Literal["bytelm"] = "bytelm"  # format of the result
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the stored tensors
    checkpoint: str = "latest"  # latest, best, or a step


def convert(args: list[str]) -> int:
    from bytelm.interop.weights import is_weights_dir, load_config, load_for, save_weights
    from bytelm.lm import load_run

    options = tyro.cli(ConvertOptions, args=args, prog="bytelm convert")
    if options.target.exists() and any(options.target.iterdir() if options.target.is_dir() else [options.target]):
        raise ConfigError(f"{options.target} is there and not empty: name a new folder")
    if is_weights_dir(options.source):
        model, context = load_config(options.source)
        params = load_for(model, options.source)
    else:
        config, params = load_run(options.source, options.checkpoint)
        model, context = config.model, config.data.seq_len
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


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train, "eval": evaluate, "sample": sample, "convert": convert, "parity": parity, "plan": plan,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script; ends the process with the exit status."""
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: list[str]) -> int:
    """Runs one command and returns its exit status."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return EXIT_OK if argv else EXIT_USER_ERROR
    if argv[0] in ("--version", "version"):
        print(f"bytelm {bytelm.__version__}")
        return EXIT_OK
    if argv[0] not in COMMANDS:
        return _fail(f"unknown command {argv[0]!r}; {codec.suggest(argv[0], list(COMMANDS))}")
    try:
        status = COMMANDS[argv[0]](argv[1:])
        sys.stdout.flush()
        return status
    except SystemExit as e:  # tyro: 0 for --help, 2 for a bad option
        return e.code if isinstance(e.code, int) else EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `bytelm sample ... | head`: what was asked for was read
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_USER_ERROR if argv[0] == "train" else EXIT_OK
    except Exception as e:
        return _status(e)


def _status(error: Exception) -> int:
    from bytelm.checkpoint import CheckpointError
    from bytelm.data.sources import DataError
    from bytelm.train.loop import Diverged, Interrupted

    if isinstance(error, Interrupted):
        return EXIT_INTERRUPTED
    if isinstance(error, Diverged):
        _fail(str(error))
        return EXIT_DIVERGED
    if isinstance(error, (ConfigError, CheckpointError, DataError, ImportError, OSError)):
        return _fail(str(error))
    raise error


def _fail(message: str) -> int:
    print(f"bytelm: {message}", file=sys.stderr)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    main()
