"""Weights as a directory: config.json (with our marker) and model.safetensors, one tensor per parameter path."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bytelm.checkpoint import CheckpointError
from bytelm.codec import from_dict, to_dict
from bytelm.config import ConfigError, ModelConfig
from bytelm.models.build import Params
from bytelm.parallel.rules import path_string

MARKER = "bytelm-1"
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def is_weights_dir(path: Path) -> bool:
    """Whether `path` holds a config.json with our marker."""
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8")).get("bytelm_format") == MARKER
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        return False


def save_weights(path: Path, config: ModelConfig, params: Params, context: int, dtype: str = "float32") -> None:
    """Writes a weights directory. `context` is the row length the model was trained on. Raises ConfigError, OSError."""
    tensors = {path_string(where): np.asarray(leaf) for where, leaf in jax.tree.leaves_with_path(params)}
    gate = re.compile(r"(^|/)(delete_gate|boundary)/")  # whose decisions rounding would flip
    write_tensors(path, tensors, dtype, keep=lambda name: bool(gate.search(name)), metadata={"format": MARKER})
    record = {"bytelm_format": MARKER, "context": context, "model": to_dict(config)}
    (path / "config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def write_tensors(
    path: Path,
    tensors: dict[str, NDArray],
    dtype: str,
    *,
    keep: Callable[[str], bool] = lambda _: False,
    metadata: dict[str, str],
) -> None:
    """Writes model.safetensors into a folder, in `dtype` but for names that `keep` their own; whole or not at all."""
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r}: choose {' or '.join(_DTYPES)}")
    path.mkdir(parents=True, exist_ok=True)
    stored = {name: np.asarray(x if keep(name) else x.astype(_DTYPES[dtype]), order="C") for name, x in tensors.items()}
    temporary = path / "model.safetensors.tmp"
    save_file(stored, temporary, metadata=metadata)
    temporary.replace(path / "model.safetensors")


def load_config(path: Path) -> tuple[ModelConfig, int]:
    """Model config and trained row length of a weights directory. Raises CheckpointError or ConfigError."""
    try:
        record = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return from_dict(ModelConfig, record["model"], "model"), int(record["context"])
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as e:
        raise CheckpointError(f"{path}/config.json: not a readable bytelm model config: {e!r}") from None


def load_weights(path: Path, abstract: Params) -> Params:
    """The parameters of a weights directory as float32 numpy arrays, in the structure of `abstract`.

    Raises CheckpointError naming missing, unknown and misshapen tensors.
    """
    file = path / "model.safetensors"
    try:
        with safe_open(file, framework="numpy") as opened:
            found = set(opened.keys())
            expected = {path_string(where): leaf for where, leaf in jax.tree.leaves_with_path(abstract)}
            problems = [f"missing {name}" for name in sorted(expected.keys() - found)]
            problems += [f"unknown {name}" for name in sorted(found - expected.keys())]
            tensors = {name: opened.get_tensor(name) for name in sorted(expected.keys() & found)}
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{file}: cannot be read: {e}") from None
    problems += [
        f"{name} has shape {list(t.shape)}, the config says {list(expected[name].shape)}"
        for name, t in tensors.items()
        if t.shape != expected[name].shape
    ]
    if problems:
        raise CheckpointError(
            f"{file} does not fit its config: " + "; ".join(problems[:8]) + " ..." * (len(problems) > 8)
        )
    return jax.tree.map_with_path(lambda where, _: tensors[path_string(where)].astype(np.float32), abstract)


def shapes_match(a: Any, b: Any) -> list[str]:
    """What differs between two parameter trees (arrays or shapes), as messages."""
    left = {path_string(p): x.shape for p, x in jax.tree.leaves_with_path(a)}
    right = {path_string(p): x.shape for p, x in jax.tree.leaves_with_path(b)}
    names = sorted(left.keys() | right.keys())
    return [f"{n}: {left.get(n, 'absent')} / {right.get(n, 'absent')}" for n in names if left.get(n) != right.get(n)]
