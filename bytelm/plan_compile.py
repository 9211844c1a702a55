"""A train step compiled for TPUs that are not here: `python -m bytelm.plan_compile` reads a request as JSON from
standard input and writes the outcome to standard output. `bytelm plan --topology` runs it as a process of its own,
since libtpu wants variables that a training process must not have.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bytelm.codec import from_dict, to_dict
from bytelm.config import Config, ConfigError
from bytelm.topology import Topology

# libtpu must not ask the cloud who it is, nor claim chips: it only compiles. A second one may be loaded meanwhile.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_NO_ROOM = (
    r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) (?:hbm|HBM)",
    r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)",  # says what temporaries alone take
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}


def compile_for(config: Config, topology: Topology, cache: Path) -> dict[str, Any]:
    """Compiles the train step of `config` for `topology`; the outcome of an earlier one is taken from `cache`.

    Returns sizes on one chip in bytes (arguments, outputs, aliased, temporaries, code), collectives of the compiled
    text (count and bytes of one pass through each loop), its Pallas kernels, seconds and versions; or
    {"out_of_memory": {"needs", "has"}} in GiB where it does not fit. Raises ConfigError when libtpu is missing or
    refuses, naming the extra.
    """
    versions = {name: _version(name) for name in ("jax", "jaxlib", "libtpu")}
    if not versions["libtpu"]:
        raise ConfigError("--topology compiles with libtpu, which is not installed: pip install 'bytelm[tpu]'")
    request = {"config": to_dict(config), "topology": topology.name, "slices": topology.slices}
    decides = {k: v for k, v in request["config"].items() if k in ("model", "optim", "mesh")}
    decides |= {"data": [config.data.seq_len, config.data.batch_size], "accum": config.train.grad_accum}
    key = hashlib.sha256(
        json.dumps([decides, topology.name, topology.slices, versions, _source()]).encode()
    ).hexdigest()
    path = cache / f"{key[:24]}.json"
    if path.exists():
        with contextlib.suppress(ValueError):
            return json.loads(path.read_text(encoding="utf-8"))
    env = {**os.environ, **ENVIRONMENT}
    env.pop("XLA_FLAGS", None)
    done = subprocess.run([sys.executable, "-m", "bytelm.plan_compile"], input=json.dumps(request), env=env,
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode != 0 or not done.stdout.strip():
        said = [line for line in done.stderr.splitlines() if line.strip()][-3:]
        raise ConfigError(
            f"--topology {topology.name}: the compilation failed (status {done.returncode}): " + " ".join(said)
        )
    outcome = json.loads(done.stdout.splitlines()[-1])
    if "refused" in outcome:
        raise ConfigError(outcome["refused"])
    outcome["versions"] = versions
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(outcome), encoding="utf-8")
    temporary.replace(path)
    return outcome


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _source() -> str:
    """A hash of the code that is compiled, so that a changed model is compiled anew."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for folder in ("nn", "models", "parallel", "train"):
        for path in sorted((root / folder).glob("*.py")):
            digest.update(path.read_bytes())
    for path in (Path(__file__), root / "model_config.py", root / "vocab.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _compile(request: dict[str, Any]) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import NamedSharding

    from bytelm.parallel.mesh import check_rows, make_mesh, to_spec
    from bytelm.train.capacity import first_capacity
    from bytelm.train.state import plan_state
    from bytelm.train.step import fed_shapes, make_train_step

    config = from_dict(Config, request["config"])
    options = {"num_slices": request["slices"]} if request["slices"] > 1 else {}
    described = topologies.get_topology_desc(platform="tpu", topology_name=request["topology"], **options)
    try:
        mesh = make_mesh(config.mesh, list(described.devices))
        check_rows(mesh, config.data.batch_size, config.train.grad_accum)
        with jax.set_mesh(mesh):
            setup = plan_state(config, mesh)
    except ConfigError as e:
        return {"refused": str(e)}
    split = NamedSharding(mesh, to_spec(("batch", "length"), mesh.axis_names))
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split) for name, shape in fed_shapes(config).items()}
    began = time.monotonic()
    with jax.set_mesh(mesh):
        step: Any = make_train_step(config, setup)
        traced = step.trace(setup.abstract, batch, first_capacity(config.model, config.data.seq_len))
        try:
            compiled = traced.lower(lowering_platforms=("tpu",)).compile()
        except jax.errors.JaxRuntimeError as e:
            memory = out_of_memory(str(e))
            if memory is None:
                raise
            return {"out_of_memory": memory, "seconds": time.monotonic() - began}
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return {
        "mesh": dict(mesh.shape), "hosts": len({d.process_index for d in mesh.devices.flat}),
        "seconds": time.monotonic() - began,
        "arguments": memory.argument_size_in_bytes, "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes, "collectives": count_collectives(text),
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
    }  # fmt: skip


def out_of_memory(said: str) -> dict[str, float] | None:
    """GiB that a step needs and a chip has, from what XLA says; None when it says something else."""
    for pattern in _NO_ROOM:
        match = re.search(pattern, said)
        if match:
            break
    else:
        return None
    unit = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 1024.0}
    return {"needs": float(match[1]) * unit[match[2]], "has": float(match[3]) * unit[match[4]]}


def count_collectives(text: str) -> dict[str, dict[str, float]]:
    """How often each kind of collective stands in a compiled text, and the bytes of their results together.

    What stands in a loop counts once, however often the loop runs.
    """
    found: dict[str, dict[str, float]] = {}
    kinds = "|".join(COLLECTIVES)
    for shape, kind, start in re.findall(rf"= (\(?[^=]*?) ({kinds})(-start)?\(", text):
        sizes = [_BYTES.get(t, 4) * _product(dims) for t, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)]
        entry = found.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += sum(sizes[len(sizes) // 2 :] if start and len(sizes) > 1 else sizes)  # operands, results
    return found


def _product(dims: str) -> int:
    out = 1
    for d in filter(None, dims.split(",")):
        out *= int(d)
    return out


if __name__ == "__main__":
    print(json.dumps(_compile(json.load(sys.stdin))))
