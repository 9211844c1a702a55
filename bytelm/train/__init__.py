"""Training. The package itself is callable, so that `bytelm.train(config)` and `bytelm.train.loop` are both true."""

import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bytelm.config import Config
    from bytelm.train.loop import Result


class _TrainPackage(types.ModuleType):
    def __call__(self, config: "Config") -> "Result":
        """Trains a model; see `bytelm.train.loop.train`."""
        from bytelm.train.loop import train

        return train(config)


sys.modules[__name__].__class__ = _TrainPackage
