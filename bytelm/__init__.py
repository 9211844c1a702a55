"""Byte-level and hierarchical language models in JAX: train, convert, evaluate.

import bytelm
lm = bytelm.load("runs/quickstart")
lm.logprobs(b"The quick brow")              # float64[257]
lm.score(b" fox", context=b"The quick brown")
lm.generate(b"Once upon", max_bytes=200, temperature=0.8)

bytelm.train(bytelm.load_config("configs/quickstart.yaml"))
"""

from typing import TYPE_CHECKING, Any

from bytelm.xla_flags import set_flags

__version__ = "0.1.0"

set_flags()

if TYPE_CHECKING:
    import bytelm.train as train
    from bytelm.codec import load as load_config
    from bytelm.config import Config
    from bytelm.lm import ByteLM, Score, load

__all__ = ["ByteLM", "Config", "Score", "load", "load_config", "train"]

_HOMES = {
    "ByteLM": ("bytelm.lm", "ByteLM"),
    "Config": ("bytelm.config", "Config"),
    "Score": ("bytelm.lm", "Score"),
    "load": ("bytelm.lm", "load"),
    "load_config": ("bytelm.codec", "load"),
}


def __getattr__(name: str) -> Any:
    # Imported on first use: data workers and `bytelm --help` need no jax.
    import importlib

    if name == "train":  # the package is callable: bytelm.train(config)
        return importlib.import_module("bytelm.train")
    if name in _HOMES:
        module, attribute = _HOMES[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'bytelm' has no attribute {name!r}")
