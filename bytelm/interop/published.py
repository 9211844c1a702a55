"""Any folder or file of weights as a model: ours, or a published one, told apart by its config.json."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from bytelm.checkpoint import CheckpointError
from bytelm.config import ConfigError, HNetConfig, ModelConfig
from bytelm.interop import hnet
from bytelm.interop.torch_file import TorchFile
from bytelm.interop.weights import is_weights_dir, load_config, load_weights, write_tensors
from bytelm.models.build import Params, structure

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

    def __getitem__(self, name: str) -> NDArray:
        return self._file.get_tensor(name)

    def describe(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        return self._shapes


def is_model(path: Path) -> bool:
    """Whether `path` is a folder or file that `open_model` knows (its contents may still be broken)."""
    return path.is_file() or is_weights_dir(path) or _record(path).keys() >= {"arch_layout"}


def open_model(path: Path, config_file: Path | None = None) -> StoredModel:
    """The model in a folder (ours, or an H-Net with the reference's config.json beside a .pt or .safetensors file), or
    in a bare .pt / .safetensors file whose reference config is `config_file`.

    Raises CheckpointError for what is missing or broken, ConfigError for a config that cannot be read.
    """
    if path.is_file():
        if config_file is None:
            raise ConfigError(
                f"{path}: a bare file of weights; name its config (H-Net's JSON) with --config, or put it beside the "
                "file as config.json and give the folder"
            )
        return _hnet(_read_json(config_file), str(config_file), path)
    if config_file is not None:
        raise ConfigError(f"--config goes with a bare file of weights; {path} is a folder with a config of its own")
    if is_weights_dir(path):
        model, context = load_config(path)
        return StoredModel(model, context, lambda: load_weights(path, structure(model)[1]))
    record = _record(path)
    if "arch_layout" in record:
        files = sorted(f for f in path.iterdir() if f.suffix in (".pt", ".safetensors"))
        if len(files) != 1:
            found = ", ".join(f.name for f in files) or "none"
            raise CheckpointError(f"{path}: expected one .pt or .safetensors file beside config.json; found: {found}")
        return _hnet(record, f"{path}/config.json", files[0])
    kind = record.get("model_type", "unknown") if record else None
    raise CheckpointError(
        f"{path}: {NO_MODEL}" if kind is None else
        f"{path}: this version of bytelm does not load {kind} models; it loads its own runs and weights, and H-Nets"
    )  # fmt: skip


def open_tensors(path: Path) -> TorchFile | SafetensorsFile:
    """The named tensors of a .pt or .safetensors file, by its content. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            start = file.read(2)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e}") from None
    return TorchFile(path) if start == b"PK" or path.suffix in (".pt", ".pth", ".bin") else SafetensorsFile(path)


def _hnet(record: dict, where: str, file: Path) -> StoredModel:
    config = hnet.config_from(record, where)

    def read() -> Params:
        tensors = open_tensors(file)
        check_tensors(tensors.describe(), config, str(file))
        wide = _Float32(tensors)
        return jax.tree.map(np.asarray, hnet.params_from(wide, config))

    return StoredModel(config, hnet.TRAINED_LENGTH, read)


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
    record = hnet.reference_config(config)
    tensors = hnet.state_dict(jax.tree.map(lambda x: np.asarray(x, np.float32), params), config)
    write_tensors(path, tensors, dtype, keep=hnet.keeps_float32, metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def check_tensors(found: Mapping[str, tuple[int, ...]], config: HNetConfig, where: str) -> None:
    """Raises CheckpointError naming the tensors that are missing, unknown or misshapen for an H-Net config."""
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


def expected_shapes(config: HNetConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the reference's state dict for a config; allocates no weights."""
    shapes = jax.eval_shape(lambda params: hnet.state_dict(params, config, jnp), structure(config)[1])
    return {name: tuple(value.shape) for name, value in shapes.items()}


def _record(path: Path) -> dict:
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
