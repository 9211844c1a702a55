"""Starting weights out of other models: a run, a weights directory or a published checkpoint (train.init_from), the
entropy model that cuts patches (train.patcher), the blocks of a tokenized model (train.backbone)."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from bytelm.checkpoint import CheckpointError, find_checkpoint, read_meta, restore_params, stored_config
from bytelm.config import (
    BLTConfig,
    Config,
    ConfigError,
    FlatConfig,
    HATConfig,
    HNetConfig,
    ModelConfig,
    StackConfig,
)
from bytelm.data.corpus import Corpus
from bytelm.interop.backbone import Blocks, open_blocks
from bytelm.interop.published import is_model, open_model
from bytelm.interop.weights import shapes_match
from bytelm.models.build import Params, byte_ids, entropy_rule, structure
from bytelm.models.units import Units
from bytelm.parallel.hosts import place
from bytelm.parallel.mesh import compiler_options
from bytelm.parallel.rules import path_string
from bytelm.vocab import NUM_SYMBOLS

# What a model may have that the weights it starts from do not: a ByT5 becomes an MrT5, chunks come by entropy,
# further bytes are predicted.
FRESH = re.compile(r"(encoder/(delete_gate|boundary|pool)|patcher|ahead)/")


def load_initial_params(source: str, abstract: Params, fresh: Params) -> tuple[Params, list[str]]:
    """Weights of `source`, laid out as `abstract` (shapes with shardings), and the paths of those that it does not have
    and that stay as in `fresh`.

    Raises ConfigError when it is neither a run nor a weights directory, or its parameters have other names or shapes.
    """
    config, read = _open(source, "train.init_from")
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
    found = read(wanted)
    flat = {path_string(path): x for path, x in jax.tree.leaves_with_path(found)}
    return jax.tree.map_with_path(lambda path, x: flat.get(path_string(path), x), fresh), kept


def _open(source: str, field: str) -> tuple[ModelConfig, Callable[[Params], Params]]:
    """The model in a run, a weights directory or a published checkpoint, and a function that reads its weights into the
    layout of shapes with shardings. Raises ConfigError naming the field when it is none."""
    path = Path(source)
    try:
        if is_model(path):
            stored = open_model(path)
            put = lambda value, a: place(np.asarray(value), a.sharding)  # noqa: E731
            return stored.config, lambda wanted: jax.tree.map(put, stored.read(), wanted)
        folder = path if (path / "meta").is_dir() else find_checkpoint(path)
        return stored_config(read_meta(folder), str(folder)).model, lambda wanted: restore_params(folder, wanted)
    except CheckpointError as e:
        raise ConfigError(f"{field}={source}: {e}") from None


def with_parts(config: Config) -> Config:
    """The config with what train.patcher and train.backbone say of those parts of the model. Raises ConfigError for
    parts that the model does not have, or that do not fit."""
    for field in ("patcher", "backbone"):
        source = getattr(config.train, field)
        if source and not Path(source).exists():
            raise ConfigError(
                f"train.{field}={source}: no such file or directory; a run that has begun holds what it needs of it "
                f"and goes on with --train.{field} ''"
            )
    model = config.model
    if config.train.patcher:
        rule = entropy_rule(model)
        if rule is None or not isinstance(model, BLTConfig | HNetConfig):
            raise ConfigError(
                f"train.patcher={config.train.patcher}: this {model.family} model has no patches by entropy"
            )
        flat, _ = _open(config.train.patcher, "train.patcher")
        if type(flat) is not FlatConfig:
            raise ConfigError(f"train.patcher={config.train.patcher}: a {flat.family} model; only a flat one can be it")
        rule = dataclasses.replace(rule, stack=flat.stack, tie_embeddings=flat.tie_embeddings, symbols=NUM_SYMBOLS)
        model = dataclasses.replace(model, patcher=rule)
    if config.train.backbone:
        if not isinstance(model, HATConfig):
            raise ConfigError(
                f"train.backbone={config.train.backbone}: only a HAT has such a backbone, not {model.family}"
            )
        blocks, own = _blocks(config.train.backbone)[0], model.backbone
        stack = dataclasses.replace(blocks, attention=own.attention, scan_layers=own.scan_layers, remat=own.remat)
        model = dataclasses.replace(model, backbone=stack)
    return dataclasses.replace(config, model=model)


def _blocks(source: str) -> tuple[StackConfig, Callable[[], Blocks]]:
    """The blocks of a tokenized model (`open_blocks`)."""
    try:
        return open_blocks(Path(source))
    except CheckpointError as e:
        raise ConfigError(f"train.backbone={source}: {e}") from None


def load_parts(
    config: Config, abstract: Params, params: Params, fresh: Sequence[str], sources: Sequence[Corpus] = ()
) -> tuple[Params, dict[str, float]]:
    """(`params` with the weights of train.patcher and train.backbone in their places, what it cost to fit them, for the
    log). `sources` is the training text. Raises ConfigError where an entropy model is among the `fresh` parameters
    (paths) and would stay so."""
    out, cost = dict(params), {}
    if config.train.patcher:
        out["patcher"] = _open(config.train.patcher, "train.patcher")[1](abstract["patcher"])
    elif any(name.startswith("patcher/") for name in fresh):
        raise ConfigError(
            "train.patcher is not set: patches by entropy need the model that finds them. Train a small flat one with "
            "windows (configs/entropy_tiny.yaml), choose a threshold with bytelm patches, and name its run here"
        )
    if config.train.backbone:
        blocks = _blocks(config.train.backbone)[1]()
        put = lambda x, a: place(np.asarray(x, np.float32), a.sharding)  # noqa: E731
        out["backbone"] = jax.tree.map(put, blocks.params, abstract["backbone"])
        out["pool"] = _scaled_pool(config.model, out, blocks.embedding_size)
        if config.train.word_steps:
            from bytelm.lm import load_vocabulary  # the byte view is for those who ask for it
            from bytelm.train.word_reader import teach_words

            vocabulary = load_vocabulary(Path(config.train.backbone))
            out, error, flops = teach_words(config, out, blocks, vocabulary, sources)
            cost = {"word_error": error, "word_flops": flops}
        out["guide"] = _fitted_guide(config.model, out, blocks.norm)
    return out, cost


def _sample(model: ModelConfig) -> np.ndarray:
    """A row of text to measure sizes on, [1, t]."""
    text = (
        b"It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness,"
    )
    return np.frombuffer(bytes([byte_ids(model).start]) + text, np.uint8).astype(np.int32)[None]


def _scaled_pool(model: ModelConfig, params: Params, size: float) -> Params:
    """The word pooling of a fresh HAT, made so large that words have the root mean square `size`: blocks add to what
    comes in, and those that were trained on embeddings of one size do little to much larger ones."""
    graph, _ = structure(model)

    def scaled(params, inputs):
        e, units = nnx.merge(graph, params).words(inputs)
        ratio = size / _size(e, units, inputs)
        return {**params["pool"], "out": {"kernel": params["pool"]["out"]["kernel"] * ratio}}

    return _on_devices(scaled, params["pool"])(params, _sample(model))


def _fitted_guide(model: ModelConfig, params: Params, norm: np.ndarray) -> Params:
    """The guides of a fresh HAT, whose norms get the scale of the tokenized model's last one: it takes out the few huge
    features that blocks make. Of such a size that what is normed is about 1."""
    graph, _ = structure(model)

    def fitted(params, inputs):
        network = nnx.merge(graph, params)
        e, units = network.words(inputs)
        o = network.backbone(e).astype(jnp.float32)
        scale = norm / _size(o * jax.lax.rsqrt(jnp.mean(o**2, axis=-1, keepdims=True)) * norm, units, inputs)
        layer = params["guide"]["layer"]
        scale = jnp.broadcast_to(scale, layer["norm"]["scale"].shape)
        return {**params["guide"], "layer": {**layer, "norm": {"scale": scale}}}

    return _on_devices(fitted, params["guide"])(params, _sample(model))


def _size(x: Array, units: Units, inputs: Array) -> Array:
    """Root mean square of the vectors of real words."""
    real = (units.first < inputs.shape[1])[..., None]
    return jnp.sqrt(jnp.sum(jnp.where(real, x.astype(jnp.float32), 0) ** 2) / (jnp.sum(real) * x.shape[-1]))


def _on_devices(f: Callable[..., Params], like: Params) -> Callable[..., Params]:
    """f, compiled; what it gives lies where the arrays of `like` do."""
    shardings = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(f, out_shardings=shardings, compiler_options=compiler_options(jax.sharding.get_mesh()))


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
