"""Attention kernels that a config asks for, and the devices that have them."""

import dataclasses
from typing import Any

from bytelm.config import ConfigError

PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}  # auto and xla run everywhere


def check_kernels(config: Any, platform: str, name: str = "model") -> None:
    """Raises ConfigError where a model config asks for a kernel that a platform (cpu, gpu, tpu) does not have."""
    for field in dataclasses.fields(config):
        value, where = getattr(config, field.name), f"{name}.{field.name}"
        if dataclasses.is_dataclass(value):
            check_kernels(value, platform, where)
        elif field.name == "attention" and PLATFORMS.get(value, platform) != platform:
            raise ConfigError(f"{where}={value}: runs on {PLATFORMS[value]} only, and this is {platform}; use auto")


def on_any_device(config: Any) -> Any:
    """A model config that asks for no device's own kernel: weights trained on one are read on another."""
    changed = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changed[field.name] = on_any_device(value)
        elif field.name == "attention" and value in PLATFORMS:
            changed[field.name] = "auto"
    return dataclasses.replace(config, **changed)
