"""Strict YAML for config dataclasses: an unknown key or a wrong type is an error that says where and what to write."""

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from bytelm.config import Config, ConfigError


def to_dict(config: Any) -> Any:
    """Turns a config into plain dicts, lists and scalars (what `from_dict` reads)."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple):
        return [to_dict(item) for item in config]
    return config


def from_dict(cls: Any, data: Any, path: str = "") -> Any:
    """Builds `cls` from plain data; a union of configs is told apart by `family` (left out: the first one's).

    Raises ConfigError with the path, the value and what was expected.
    """
    if data is None:
        data = {}
    if typing.get_args(cls):
        cls = _member(cls, data, path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path or 'config'}: got {_show(data)}, expected a mapping with fields of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    values = {}
    for key, value in data.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in names:
            raise ConfigError(f"{where}: unknown key; {suggest(str(key), names)}")
        values[key] = _decode(hints[key], value, where)
    try:
        return cls(**values)
    except TypeError as e:
        raise ConfigError(f"{path or cls.__name__}: {e}") from None


def _member(union: Any, data: Any, path: str) -> Any:
    """The config class of a union whose family `data` names."""
    members = {c.__dataclass_fields__["family"].default: c for c in typing.get_args(union)}
    family = data.get("family", next(iter(members))) if isinstance(data, dict) else next(iter(members))
    if family not in members:
        raise ConfigError(
            f"{path + '.' if path else ''}family: unknown value {family!r}; {suggest(str(family), list(members))}"
        )
    return members[family]


def _decode(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) or origin is types.UnionType:
        return from_dict(hint, value, path)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in args):
            raise ConfigError(f"{path}: got {_show(value)}, expected one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}: got {_show(value)}, expected a list, such as [{_show(value)}]")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_decode(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
        if len(value) != len(args):
            raise ConfigError(f"{path}: got {len(value)} items, expected {len(args)}")
        return tuple(_decode(arg, item, f"{path}[{i}]") for i, (arg, item) in enumerate(zip(args, value)))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        hint_name = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}.get(hint, hint)
        extra = ""
        if hint is float and isinstance(value, str) and _is_float(value):
            extra = f" (YAML reads {value} as a string: write {_yaml_float(value)})"
        raise ConfigError(f"{path}: got {_show(value)}, expected {hint_name}{extra}")
    return value


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _yaml_float(text: str) -> str:
    mantissa, _, exponent = text.lower().partition("e")
    mantissa = mantissa if "." in mantissa else mantissa + ".0"
    return f"{mantissa}e{exponent if exponent[:1] in '+-' else '+' + exponent}" if exponent else mantissa


def _show(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def suggest(key: str, names: list[str]) -> str:
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice (plain YAML silently keeps the last)."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"a key must be a name ({key_node.start_mark})")
        key = loader.construct_object(key_node)
        if key in seen:
            raise ConfigError(f"key {key!r} is given twice ({key_node.start_mark})")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def loads(text: str, cls: Any = Config, source: str = "config") -> Any:
    """Parses YAML text into `cls`. Raises ConfigError, prefixed with `source`."""
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)
        return from_dict(cls, data)
    except yaml.YAMLError as e:
        raise ConfigError(f"{source}: not valid YAML: {e}") from None
    except ConfigError as e:
        raise ConfigError(f"{source}: {e}") from None


def load(path: str | Path, cls: Any = Config) -> Any:
    """Reads a YAML config file. Raises ConfigError when it is missing, not text, or not a valid config."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read as a config: {e}") from None
    if not text.strip():
        raise ConfigError(f"{path}: the config file is empty")
    return loads(text, cls, str(path))


def dumps(config: Any) -> str:
    """Writes a config as YAML that `loads` reads back to an equal config."""
    data = to_dict(config)
    # PyYAML writes these line separators as they are and reads them back as something else: then everything is escaped.
    plain = not any(mark in text for text in _strings(data) for mark in "\x85\u2028\u2029")
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=plain, width=120)


def _strings(data: Any) -> list[str]:
    if isinstance(data, dict):
        return [text for value in data.values() for text in _strings(value)]
    if isinstance(data, list):
        return [text for value in data for text in _strings(value)]
    return [data] if isinstance(data, str) else []


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Dotted names of the fields in which two configs differ, with both values: `optim.lr: 0.001 -> 0.002`."""
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        out = []
        for f in dataclasses.fields(a):
            out += differences(getattr(a, f.name), getattr(b, f.name), f"{path}.{f.name}" if path else f.name)
        return out
    return [] if a == b else [f"{path}: {a!r} -> {b!r}"]
