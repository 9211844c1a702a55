"""The `bytelm` command. User mistakes end in one message and exit status 2, never in a traceback."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

import bytelm
from bytelm import cli_model, cli_sample, codec
from bytelm.config import Config, ConfigError, TokensConfig
from bytelm.host_memory import keep_memory

EXIT_OK, EXIT_CHECK_FAILED, EXIT_USER_ERROR, EXIT_DIVERGED, EXIT_INTERRUPTED = 0, 1, 2, 3, 75

USAGE = """usage: bytelm COMMAND ...

  prepare OUT INPUT ... [--on-error skip] [--deduplicate]       make a corpus of sharded ArrayRecord files
  patches MODEL TEXT ... [--size 4.5]                           choose where entropy begins a patch (BLT)
  train   CONFIG.yaml [--section.field value ...] [--dry-run]   train a model, or go on with a run (its folder)
  eval    MODEL ... [--suite bpb,noise,cute] [--out DIR]        measure models, side by side
  sample  RUN --prompt TEXT                                     let a model write
  chunks  RUN --text TEXT [--html FILE]                         show how a model cuts a text
  compress   MODEL FILE                                         into FILE.bytelm, by arithmetic coding
  decompress MODEL FILE.bytelm                                  and back
  convert RUN DST                                               write weights as safetensors + config.json
  parity  CASE_DIR                                              does this machine still give the reference numbers?
  plan    CONFIG.yaml [--devices N] [--topology v5p:4x4x4]      parameters, FLOPs and memory, before anything runs

  bytelm COMMAND --help says more; bytelm --version prints the version."""


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
    from bytelm.parallel import hosts

    try:
        _train(config)
    except Exception as e:
        if not hosts.several():
            raise
        _leave(e)
    return EXIT_OK


def _train(config: Config) -> None:
    import jax

    from bytelm.parallel import hosts
    from bytelm.plan import explain_out_of_memory
    from bytelm.train.loop import train as run

    try:
        run(config)
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" in str(e):
            raise ConfigError(explain_out_of_memory(config, str(e), len(jax.devices()))) from None
        if hosts.several():
            raise hosts.Lost(f"another process is gone: {str(e).splitlines()[0]}") from None
        raise


def _leave(error: Exception) -> None:
    """Ends one of several processes at once, whatever the error: the others would wait for this one."""
    import traceback

    from bytelm.data.pipeline import PipelineError
    from bytelm.parallel import hosts
    from bytelm.train.loop import Interrupted

    try:
        if isinstance(error, Interrupted):  # all were asked, and all have saved
            hosts.barrier("stopped")
        # A worker that died is no mistake of the user's: starting all again goes on from the last checkpoint.
        status = EXIT_CHECK_FAILED if isinstance(error, PipelineError) else _status(error)
    except Exception:
        traceback.print_exc()
        status = EXIT_CHECK_FAILED
    hosts.leave(str(error), status)


def _dry_run(config: Config) -> int:
    import jax

    from bytelm.data.pipeline import load_text
    from bytelm.parallel.mesh import make_mesh
    from bytelm.plan import describe_plan, make_plan
    from bytelm.train.init import with_parts
    from bytelm.train.state import plan_state

    config = with_parts(config)
    if isinstance(config.model, TokensConfig):
        from bytelm.train.tokens import check_given

        check_given(config)
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

    --devices N: plan for N devices; --chip NAME: compare with a chip (v5p, v6e, h100, h200 ...); --bytes-per-chunk
    4.8,9: of each level of an H-Net (default: its targets); --json: as JSON.

    --topology v5p:4x4x4 (or a cloud name: v5p-128, v5litepod-16, v6e-256): compiles the train step for that TPU slice
    (extra: tpu) and adds memory as compiled, communication, times and chip-hours; --num-slices N: for N of them.
    --sweep: ranks all meshes of that slice by formulas instead; nothing is compiled."""
    from bytelm.data.sources import cache_folder
    from bytelm.plan import describe_plan, make_plan, to_json
    from bytelm.plan_pod import describe_pod_plan, make_pod_plan, pod_to_json
    from bytelm.plan_sweep import describe_sweep, sweep, sweep_to_json
    from bytelm.topology import parse_topology
    from bytelm.train.init import with_parts

    source, rest = _config_command(args, "plan", plan.__doc__ or "")
    as_json, rest = _take_flag(rest, "--json")
    all_meshes, rest = _take_flag(rest, "--sweep")
    devices, rest = _take_option(rest, "--devices", "0")
    chip, rest = _take_option(rest, "--chip", "")
    chunks, rest = _take_option(rest, "--bytes-per-chunk", "")
    topology, rest = _take_option(rest, "--topology", "")
    slices, rest = _take_option(rest, "--num-slices", "1")
    try:
        per_chunk = tuple(float(n) for n in chunks.split(",") if n)
    except ValueError:
        raise ConfigError(f"--bytes-per-chunk {chunks}: give numbers with commas between them, one per level") from None
    for option, value in (("--devices", devices), ("--num-slices", slices)):
        if not (value.isascii() and value.isdecimal()):
            raise ConfigError(f"{option} {value}: must be a whole number")
    config = with_parts(read_config(source, rest, "bytelm plan"))
    if all_meshes and not topology:
        raise ConfigError("--sweep ranks the meshes of a slice: name it with --topology, as in --topology v5p:4x4x4")
    if all_meshes:
        slice_ = parse_topology(topology, int(slices))
        ranked = sweep(config, slice_, per_chunk)
        print(sweep_to_json(*ranked) if as_json else describe_sweep(slice_, *ranked))
        return EXIT_OK
    if topology:
        pod = make_pod_plan(config, parse_topology(topology, int(slices)), cache_folder("") / "plans", per_chunk)
        print(json.dumps(pod_to_json(pod)) if as_json else describe_pod_plan(config, pod))
        return EXIT_OK
    made = make_plan(config, int(devices), chip, per_chunk)
    print(json.dumps(to_json(made)) if as_json else describe_plan(config, made))
    return EXIT_OK


def prepare(args: list[str]) -> int:
    from bytelm.cli_data import prepare_command  # grain and pyarrow are not for `bytelm --help`

    return prepare_command(args)


def patches(args: list[str]) -> int:
    from bytelm.cli_data import patches_command

    return patches_command(args)


def evaluate(args: list[str]) -> int:
    from bytelm.cli_eval import evaluate_command

    return evaluate_command(args)


def compress(args: list[str]) -> int:
    from bytelm.cli_compress import compress_command

    return compress_command(args)


def decompress(args: list[str]) -> int:
    from bytelm.cli_compress import decompress_command

    return decompress_command(args)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "prepare": prepare, "patches": patches,
    "train": train, "eval": evaluate, "sample": cli_sample.sample, "chunks": cli_model.chunks,
    "compress": compress, "decompress": decompress,
    "convert": cli_model.convert, "parity": cli_model.parity, "plan": plan,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script; ends the process with the exit status."""
    keep_memory()
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
    from bytelm.coding import CodeError
    from bytelm.data.readers import DataError
    from bytelm.parallel.hosts import Lost
    from bytelm.protocol import ImpossibleText
    from bytelm.train.loop import Diverged, Interrupted
    from bytelm.vocab import ReservedByteError

    if isinstance(error, Interrupted):
        return EXIT_INTERRUPTED
    if isinstance(error, Diverged):
        _fail(str(error))
        return EXIT_DIVERGED
    if isinstance(error, Lost):
        return EXIT_CHECK_FAILED
    mine = (ConfigError, CheckpointError, CodeError, DataError, ReservedByteError, ImpossibleText, ImportError, OSError)
    if isinstance(error, mine):
        return _fail(str(error))
    raise error


def _fail(message: str) -> int:
    print(f"bytelm: {message}", file=sys.stderr)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    main()
