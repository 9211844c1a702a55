"""XLA options that must be set before jax meets its devices."""

import importlib.metadata
import os

# XLA's newer CPU library (YNN) gives NaN or wrong numbers for some shapes: a stack of Mamba-2 blocks over 128 rows of
# 32 does (seen with jaxlib 0.10.2 and 0.12.0; crashes: jax issues 39257 and 40412). Without it a step takes as long.
BROKEN_FROM, UNKNOWN_FROM = (0, 10, 2), (0, 13)  # a version that does not know the option would refuse to start
OPTION = "--xla_cpu_experimental_ynn_fusion_type"


def set_flags() -> None:
    """Turns that library off where it is broken, unless XLA_FLAGS say something of it."""
    try:
        version = importlib.metadata.version("jaxlib")
    except importlib.metadata.PackageNotFoundError:
        return
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
    flags = os.environ.get("XLA_FLAGS", "")
    if BROKEN_FROM <= numbers < UNKNOWN_FROM and OPTION not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {OPTION}=".strip()
