"""Starting weights from another run, a weights directory, or a published checkpoint (train.init_from)."""

import re
from pathlib import Path

import jax
import numpy as np

from bytelm.checkpoint import CheckpointError, find_checkpoint, read_meta, restore_params, stored_config
from bytelm.config import ConfigError
from bytelm.interop.published import is_model, open_model
from bytelm.interop.weights import shapes_match
from bytelm.models.build import Params, structure
from bytelm.parallel.hosts import place
from bytelm.parallel.rules import path_string

# What a model may have that the weights it starts from do not: a ByT5 becomes an MrT5.
FRESH = re.compile(r"encoder/(delete_gate|boundary|pool)/")


def load_initial_params(source: str, abstract: Params, fresh: Params) -> tuple[Params, list[str]]:
    """Weights of `source`, laid out as `abstract` (shapes with shardings), and the paths of those that it does not have
    and that stay as in `fresh`.

    Raises ConfigError when it is neither a run nor a weights directory, or its parameters have other names or shapes.
    """
    path = Path(source)
    try:
        stored, folder = None, path
        if is_model(path):
            stored = open_model(path)
            config = stored.config
        else:
            folder = path if (path / "meta").is_dir() else find_checkpoint(path)
            config = stored_config(read_meta(folder), str(folder)).model
    except CheckpointError as e:
        raise ConfigError(f"train.init_from={source}: {e}") from None
    there = structure(config)[1]
    have = {path_string(path) for path, _ in jax.tree.leaves_with_path(there)}
    kept = [
        name for path, _ in jax.tree.leaves_with_path(abstract)
        if (name := path_string(path)) not in have and FRESH.match(name)
    ]  # fmt: skip
    wanted = _without(abstract, kept)
    different = shapes_match(there, wanted)
    if different:
        raise ConfigError(
            f"train.init_from={source}: its weights do not fit this model (there / here): " + "; ".join(different[:6])
        )
    if stored is not None:
        found = jax.tree.map(lambda value, a: place(np.asarray(value), a.sharding), stored.read(), wanted)
    else:
        found = restore_params(folder, wanted)
    flat = {path_string(path): x for path, x in jax.tree.leaves_with_path(found)}
    return jax.tree.map_with_path(lambda path, x: flat.get(path_string(path), x), fresh), kept


def _without(tree: Params, names: list[str]) -> Params:
    """A nested dict without some of its leaves."""

    def prune(node: Params, prefix: str) -> Params:
        out = {}
        for key, value in node.items():
            path = f"{prefix}{key}"
            if isinstance(value, dict):
                inner = prune(value, path + "/")
                out |= {key: inner} if inner else {}
            elif path not in names:
                out[key] = value
        return out

    return prune(tree, "")
