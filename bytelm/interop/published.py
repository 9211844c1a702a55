"""Any folder or file of weights as a model: ours, or a published one, told apart by its config.json."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from bytelm.checkpoint import CheckpointError
from bytelm.config import ConfigError, HNetConfig, ModelConfig, T5Config
from bytelm.interop import hierarchical, hnet, t5
from bytelm.interop.torch_file import TorchFile
from bytelm.interop.weights import is_weights_dir, load_config, load_weights, write_tensors
from bytelm.models.build import Params, structure
from bytelm.parallel.rules import path_string

NO_MODEL = "neither a run directory with checkpoints nor a weights directory (config.json, model.safetensors)"


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A model on disk: what it is, how long the rows it was trained on were, and how to read its weights (float32)."""

    config: ModelConfig
    context: int
    read: Callable[[], Params]


class SafetensorsFile(Mapping[str, NDArray]):
    """Tensors of a safetensors file, read as they are asked for."""

    def __init__(self, path: Path):
        try:
            self._file = safe_open(path, framework="numpy")
            self._shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"{path}: cannot be read: {e}") from None

    def __len__(self) -> int:
        return len(self._shapes)

    def __iter__(self):
        return iter(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __getitem__(self, name: str) -> NDArray:
        if name not in self._shapes:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def describe(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        return self._shapes


def is_model(path: Path) -> bool:
    """Whether `path` is a folder or file that `open_model` knows (its contents may still be broken)."""
    record = read_record(path)
    return (
        path.is_file()
        or is_weights_dir(path)
        or "arch_layout" in record
        or t5.is_t5(record)
        or hierarchical.is_hierarchical(record)
    )


def open_model(path: Path, config_file: Path | None = None) -> StoredModel:
    """The model in a folder (ours, an H-Net with the reference's config.json beside a .pt or .safetensors file, a ByT5,
    MrT5, HAT, SpaceByte, MegaByte or BLT), or in a bare file of weights whose reference config is `config_file`.

    Raises CheckpointError for what is missing or broken, ConfigError for a config that cannot be read.
    """
    if path.is_file():
        if config_file is None:
            raise ConfigError(
                f"{path}: a bare file of weights; name its config (the reference's JSON) with --config, or put it "
                "beside the file as config.json and give the folder"
            )
        record = _read_json(config_file)
        if hierarchical.is_hierarchical(record):
            return _hierarchical(record, str(config_file), path)
        return (_t5 if t5.is_t5(record) else _hnet)(record, str(config_file), path)
    if config_file is not None:
        raise ConfigError(f"--config goes with a bare file of weights; {path} is a folder with a config of its own")
    if is_weights_dir(path):
        model, context = load_config(path)
        return StoredModel(model, context, lambda: load_weights(path, structure(model)[1]))
    record = read_record(path)
    if "arch_layout" in record:
        files = sorted(f for f in path.iterdir() if f.suffix in (".pt", ".safetensors"))
        if len(files) != 1:
            found = ", ".join(f.name for f in files) or "none"
            raise CheckpointError(f"{path}: expected one .pt or .safetensors file beside config.json; found: {found}")
        return _hnet(record, f"{path}/config.json", files[0])
    if t5.is_t5(record):
        return _t5(record, f"{path}/config.json", weights_file(path))
    if hierarchical.is_hierarchical(record):
        return _hierarchical(record, f"{path}/config.json", weights_file(path))
    kind = record.get("model_type", "unknown") if record else None
    raise CheckpointError(
        f"{path}: {NO_MODEL}" if kind is None else
        f"{path}: this version of bytelm does not load {kind} models; it loads its own, H-Net, ByT5, MrT5, HAT, "
        "SpaceByte, MegaByte, BLT, and the byte view of GPT-2, Llama, Mistral and Qwen 2 and 3"
    )  # fmt: skip


Tensors = Mapping[str, NDArray]


class _Described(Mapping[str, NDArray]):
    """Tensors of several files under one roof, or under other names: name -> (file, its name there, transposed)."""

    def __init__(self, places: Mapping[str, tuple[Any, str, bool]]):
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self):
        return iter(self._places)

    def __getitem__(self, name: str) -> NDArray:
        tensors, there, turned = self._places[name]
        return np.asarray(tensors[there]).T if turned else np.asarray(tensors[there])

    def describe(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        shapes = {}
        for name, (tensors, there, turned) in self._places.items():
            shape = tuple(tensors.describe()[there] if hasattr(tensors, "describe") else tensors[there].shape)
            shapes[name] = shape[::-1] if turned else shape
        return shapes


def open_tensors(path: Path) -> TorchFile | SafetensorsFile | _Described:
    """The named tensors of a file, by its content: .pt and .bin, .safetensors, flax .msgpack, or the .index.json of
    several of the first two. Raises CheckpointError."""
    if path.name.endswith(".index.json"):
        return _indexed(path)
    if path.suffix == ".msgpack":
        return _msgpack(path)
    try:
        with open(path, "rb") as file:
            start = file.read(2)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e}") from None
    return TorchFile(path) if start == b"PK" or path.suffix in (".pt", ".pth", ".bin") else SafetensorsFile(path)


def _indexed(path: Path) -> _Described:
    """Tensors that an index spreads over several files beside it."""
    where = _read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(f, str) for f in where.values()):
        raise CheckpointError(f"{path}: no weight_map from tensors to files")
    if any(Path(file).name != file for file in where.values()):
        raise CheckpointError(f"{path}: its weight_map leaves the folder")
    files = {file: open_tensors(path.parent / file) for file in sorted(set(where.values()))}
    missing = [name for name, file in where.items() if name not in files[file]]
    if missing:
        raise CheckpointError(f"{path}: {where[missing[0]]} has no tensor {missing[0]}")
    return _Described({name: (files[file], name, False) for name, file in where.items()})


def _msgpack(path: Path) -> _Described:
    """Tensors of a flax file in PyTorch's names: kernels there are [in, out], embeddings have a name of their own."""
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
        leaves = {".".join(str(key.key) for key in keys): value for keys, value in jax.tree.leaves_with_path(tree)}
    except Exception as e:  # msgpack and numpy raise many kinds for a damaged file
        raise CheckpointError(f"{path}: cannot be read as a flax msgpack file: {e}") from None
    places = {}
    for name, value in leaves.items():
        stem, _, last = name.rpartition(".")
        if not isinstance(value, (np.ndarray, jax.Array)):
            raise CheckpointError(f"{path}: {name} is not an array")
        renamed = f"{stem}.weight" if last in ("kernel", "embedding") else name
        places[renamed] = (leaves, name, last == "kernel")
    return _Described(places)


def _family(config: HNetConfig | T5Config) -> Any:
    """The module that knows a model's published names."""
    return hnet if isinstance(config, HNetConfig) else t5


def _read_params(file: Path, config: HNetConfig | T5Config, tensors: Any) -> Params:
    check_tensors(tensors.describe(), config, str(file))
    return jax.tree.map(np.asarray, _family(config).params_from(_Float32(tensors), config))


def _hnet(record: dict, where: str, file: Path) -> StoredModel:
    config = hnet.config_from(record, where)
    return StoredModel(config, hnet.TRAINED_LENGTH, lambda: _read_params(file, config, open_tensors(file)))


WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "flax_model.msgpack",
)  # fmt: skip


def weights_file(folder: Path) -> Path:
    """The weights that a folder of transformers holds, in this order."""
    for name in WEIGHT_FILES:
        if (folder / name).exists():
            return folder / name
    raise CheckpointError(f"{folder}: no weights beside config.json; looked for {', '.join(WEIGHT_FILES)}")


def _t5(record: dict, where: str, file: Path) -> StoredModel:
    tensors = open_tensors(file)
    shared = t5.find_shared(tensors)
    names = {name: (tensors, name, False) for name in tensors if not t5.is_ignored(name)}
    if shared in tensors:
        names["shared.weight"] = (tensors, shared, False)
    config = t5.config_from(record, where, head="lm_head.weight" in names)
    return StoredModel(config, t5.TRAINED_LENGTH, lambda: _read_params(file, config, _Described(names)))


def _hierarchical(record: dict, where: str, file: Path) -> StoredModel:
    config = hierarchical.config_from(record, where)

    def read() -> Params:
        tensors = open_tensors(file)
        check_hierarchical(_Shapes(tensors.describe()), config, str(file))
        return jax.tree.map(np.asarray, hierarchical.params_from(_Float32(tensors), config))

    return StoredModel(config, hierarchical.trained_length(record, config), read)


def check_hierarchical(tensors: Mapping[str, NDArray], config: hierarchical.HierarchicalConfig, where: str) -> None:
    """Raises CheckpointError for tensors of a hierarchical model that are missing, unknown or misshapen."""
    try:
        used = hierarchical.used_names(tensors, config)
        params = hierarchical.params_from(tensors, config)
        found = {path_string(path): tuple(x.shape) for path, x in jax.tree.leaves_with_path(params)}
    except KeyError as e:
        raise CheckpointError(f"{where} does not fit its config: missing {e.args[0]}") from None
    except ValueError as e:
        raise CheckpointError(f"{where} does not fit its config: {e}") from None
    unknown = sorted(set(tensors) - used)
    if unknown:
        raise CheckpointError(f"{where} does not fit its config: unknown {', '.join(unknown[:8])}")
    expected = {path_string(path): tuple(x.shape) for path, x in jax.tree.leaves_with_path(structure(config)[1])}
    wrong = [f"{name} has shape {found.get(name)}, the config says {shape}" for name, shape in expected.items()
             if found.get(name) != shape]  # fmt: skip
    if wrong:
        raise CheckpointError(f"{where} does not fit its config: {'; '.join(wrong[:4])}")


class _Shapes(Mapping[str, NDArray]):
    """Tensors of the shapes given, all zero, that take no room."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self._shapes = shapes

    def __len__(self) -> int:
        return len(self._shapes)

    def __iter__(self):
        return iter(self._shapes)

    def __getitem__(self, name: str) -> NDArray:
        return np.broadcast_to(np.int8(0), self._shapes[name])


class _Float32(Mapping[str, NDArray]):
    """Tensors turned to float32 one at a time, so that two copies of a model are never held."""

    def __init__(self, tensors: Mapping[str, NDArray]):
        self._tensors = tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self):
        return iter(self._tensors)

    def __getitem__(self, name: str) -> NDArray:
        return np.array(self._tensors[name], np.float32)  # a copy: the file may change under a mapped one


def save_hnet(path: Path, config: ModelConfig, params: Params, dtype: str = "float32") -> None:
    """Writes an H-Net as the reference names it: config.json and model.safetensors. What the reference holds in float32
    in every model stays so. Raises ConfigError for a model that is no H-Net or that the reference cannot express."""
    if not isinstance(config, HNetConfig):
        raise ConfigError(f"only H-Nets can be written as H-Net; this is a {config.family} model")
    _save(path, config, params, dtype)


def save_hf(path: Path, config: ModelConfig, params: Params, dtype: str = "float32") -> None:
    """Writes a ByT5 as transformers loads it, or an MrT5 as its authors' code does. Raises ConfigError for others."""
    if not isinstance(config, T5Config):
        raise ConfigError(f"only ByT5 and MrT5 can be written for transformers; this is a {config.family} model")
    _save(path, config, params, dtype)


def _save(path: Path, config: HNetConfig | T5Config, params: Params, dtype: str) -> None:
    family = _family(config)
    record = family.reference_config(config)
    tensors = family.state_dict(jax.tree.map(lambda x: np.asarray(x, np.float32), params), config)
    write_tensors(path, tensors, dtype, keep=family.keeps_float32, metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def check_tensors(found: Mapping[str, tuple[int, ...]], config: HNetConfig | T5Config, where: str) -> None:
    """Raises CheckpointError naming the tensors that are missing, unknown or misshapen for a config."""
    expected = expected_shapes(config)
    left_out = {"lm_head.weight"} if config.tie_embeddings else set()  # some writers store a shared tensor once
    problems = [f"missing {name}" for name in expected if name not in found and name not in left_out]
    problems += [f"unknown {name}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])}, the config says {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    if problems:
        raise CheckpointError(
            f"{where} does not fit its config: " + "; ".join(problems[:8]) + " ..." * (len(problems) > 8)
        )


def expected_shapes(config: HNetConfig | T5Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the reference's state dict for a config; allocates no weights."""
    shapes = jax.eval_shape(lambda params: _family(config).state_dict(params, config), structure(config)[1])
    return {name: tuple(value.shape) for name, value in shapes.items()}


def read_record(path: Path) -> dict:
    """config.json of a folder; {} where there is none."""
    return _read_json(path / "config.json") if (path / "config.json").exists() else {}


def _read_json(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: cannot be read as JSON: {e}") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return record
