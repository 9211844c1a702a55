"""Starting weights from another run, a weights directory, or a published checkpoint (train.init_from)."""

from pathlib import Path

import jax
import numpy as np

from bytelm.checkpoint import CheckpointError, find_checkpoint, read_meta, restore_params, stored_config
from bytelm.config import ConfigError
from bytelm.interop.published import is_model, open_model
from bytelm.interop.weights import shapes_match
from bytelm.models.build import Params, structure
from bytelm.parallel.hosts import place


def load_initial_params(source: str, abstract: Params) -> Params:
    """Weights of `source`, laid out as `abstract` (shapes with shardings).

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
    different = shapes_match(structure(config)[1], abstract)
    if different:
        raise ConfigError(
            f"train.init_from={source}: its weights do not fit this model (there / here): " + "; ".join(different[:6])
        )
    if stored is not None:
        return jax.tree.map(lambda value, a: place(np.asarray(value), a.sharding), stored.read(), abstract)
    return restore_params(folder, abstract)
