"""Reads tensors from PyTorch's zip files (`torch.save`, 1.6 and newer) without torch, running nothing that is in them.

The file's pickle may name a short list of classes, each replaced by a function of ours that only describes a tensor;
anything else is an error. A description is checked against the size of the storage it points into before any reading.
"""

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bytelm.checkpoint import CheckpointError

_DTYPES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype("<f4"), "DoubleStorage": np.dtype("<f8"), "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16), "LongStorage": np.dtype("<i8"), "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"), "CharStorage": np.dtype("i1"), "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}  # fmt: skip
_MOST_PICKLE = 64 << 20  # bytes; the largest published state dict's is about 0.1 MB


class _Fixed:
    """What the pickle gets to hold: it cannot be changed by the pickle once made."""

    __slots__ = ()

    def __setstate__(self, _: Any) -> None:
        raise pickle.UnpicklingError("it sets the state of something that has none")


class _Kind(_Fixed):
    """Stands for torch.FloatStorage and the like."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype


class _Call(_Fixed):
    """Stands for a function of torch: a call of ours."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class _Dict(dict):
    """Stands for OrderedDict; torch hangs a `_metadata` onto it, which we leave."""

    __slots__ = ()

    def __setstate__(self, _: Any) -> None:
        pass


class _Inert:
    """Stands for objects that we carry along and never look into: omegaconf's, and what those hold."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any):
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass


class _Storage(_Fixed):
    __slots__ = ("dtype", "key", "size")

    def __init__(self, key: str, dtype: np.dtype, size: int):
        self.key, self.dtype, self.size = key, dtype, size


class StoredTensor(_Fixed):
    """Where a tensor lies in the file: read when asked for."""

    __slots__ = ("offset", "shape", "storage", "strides")

    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor's description is malformed")
    if not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise pickle.UnpicklingError("a tensor's description has a number out of range")
    if math.prod(shape) and offset + sum((n - 1) * step for n, step in zip(shape, strides)) >= storage.size:
        raise pickle.UnpicklingError("a tensor reaches past the end of its storage")
    if math.prod(shape) > storage.size:
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    return StoredTensor(storage, offset, tuple(shape), tuple(strides))


_CALLS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(lambda data, *_: data),
    ("collections", "OrderedDict"): _Dict,
}
# What omegaconf's containers hold beside their own classes.
_CARRIED = {("collections", "defaultdict"), ("typing", "Any")} | {
    ("builtins", name) for name in ("list", "dict", "tuple", "set", "int", "float", "str", "bool")
}


class _Unpickler(pickle._Unpickler):  # pyrefly: ignore[missing-attribute]
    """Knows tensors, parameters and ordered dicts; refuses everything else by name.

    Python's own reader, not the one in C: that one sets memory aside for any memo number that a file may name.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CALLS:
            return _CALLS[module, name]
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _Kind(_DTYPES[name])
        if module.split(".")[0] == "omegaconf" or (module, name) in _CARRIED:
            return _Inert
        raise pickle.UnpicklingError(f"it names {module}.{name}, which a file of weights has no need of")

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _Kind)
                and isinstance(pid[2], str) and type(pid[4]) is int and pid[4] >= 0):  # fmt: skip
            raise pickle.UnpicklingError("a storage's description is malformed")
        return _Storage(pid[2], pid[1].dtype, pid[4])


class TorchFile(Mapping[str, NDArray]):
    """The named tensors of a state dict in a .pt file, as numpy arrays mapped from the file as they are asked for."""

    def __init__(self, path: Path):
        """Raises CheckpointError when the file is not torch's zip format, is damaged, or holds anything but tensors."""
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = {name.partition("/")[2]: archive.getinfo(name) for name in archive.namelist()}
                if "data.pkl" not in members:
                    raise CheckpointError(f"{path}: a zip file, but not one of torch.save (no data.pkl)")
                order = members.get("byteorder")
                if order is not None and (order.file_size > 64 or archive.read(order).strip() != b"little"):
                    raise CheckpointError(f"{path}: saved on a big-endian machine; not supported")
                if members["data.pkl"].file_size > _MOST_PICKLE:
                    raise CheckpointError(
                        f"{path}: its index has {members['data.pkl'].file_size:,} bytes; that is no state dict"
                    )
                content = _Unpickler(io.BytesIO(archive.read(members["data.pkl"]))).load()
        except CheckpointError:
            raise
        except zipfile.BadZipFile:
            raise CheckpointError(
                f"{path}: not a zip file: damaged, or of torch before 1.6 (load and save it again with torch.save)"
            ) from None
        except Exception as e:  # a hostile or damaged pickle can raise anything
            raise CheckpointError(f"{path}: refused: {e}") from None
        for key in ("state_dict", "model"):  # a training checkpoint with the weights inside
            if isinstance(content, dict) and key in content and not _is_tensors(content):
                content = content[key]
        if not _is_tensors(content):
            raise CheckpointError(f"{path}: holds no state dict (a mapping of names to tensors)")
        self._tensors: dict[str, StoredTensor] = dict(content)
        self._members = members
        for name, tensor in self._tensors.items():
            self._check(name, tensor.storage)

    def _check(self, name: str, storage: _Storage) -> None:
        info = self._members.get(f"data/{storage.key}")
        if info is None or info.file_size < storage.size * storage.dtype.itemsize:
            raise CheckpointError(f"{self.path}: the numbers of {name} are missing or cut off: a damaged file")
        if info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{self.path}: compressed tensors are not what torch.save writes")

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self):
        return iter(self._tensors)

    def describe(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> NDArray:
        tensor = self._tensors[name]
        info = self._members[f"data/{tensor.storage.key}"]
        if not math.prod(tensor.shape):
            return np.zeros(tensor.shape, tensor.dtype)
        try:
            with open(self.path, "rb") as file:  # the local header's name and extra field may differ from the index's
                file.seek(info.header_offset)
                header = file.read(30)
                name_length, extra_length = struct.unpack("<HH", header[26:30])
            start = info.header_offset + 30 + name_length + extra_length
            flat = np.memmap(self.path, tensor.dtype, "r", start, (tensor.storage.size,))
        except (OSError, ValueError, struct.error) as e:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {e}") from None
        steps = tuple(s * tensor.dtype.itemsize for s in tensor.strides)
        return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, steps, writeable=False)


def _is_tensors(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(k, str) and isinstance(v, StoredTensor) for k, v in content.items())
    )
