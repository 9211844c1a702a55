"""XLA options that must be set before jax meets its devices."""

import importlib.metadata
import os
import re

# The reductions of XLA's newer CPU library (YNN) give NaN or wrong numbers for some shapes: a stack of Mamba-2 blocks
# over 128 rows of 32 does (seen with jaxlib 0.10.2 and 0.12.0; crashes: jax issues 39257 and 40412). Its single
# matmuls are right and are kept: without them the worst gradient of one H-Net parity case is 2.8e-4, with them 8e-5
# (limit 1e-4).
BROKEN_FROM, UNKNOWN_FROM = (0, 10, 2), (0, 13)  # a version that does not know the option would refuse to start
OPTION, MATMULS = "--xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


def set_flags() -> None:
    """Keeps that library to single matmuls where it is broken, unless XLA_FLAGS say something of it; and makes threads
    enough for the CPU devices that the environment asks for, unless it says how many (NPROC)."""
    try:
        version = importlib.metadata.version("jaxlib")
    except importlib.metadata.PackageNotFoundError:
        return
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
    flags = os.environ.get("XLA_FLAGS", "")
    if BROKEN_FROM <= numbers < UNKNOWN_FROM and OPTION not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {OPTION}={MATMULS}".strip()
    # Devices of a CPU share threads, and each may have some wait in a collective of a loop and in one behind it.
    asked = re.search(r"--xla_force_host_platform_device_count=(\d+)", flags)
    devices = os.environ.get("JAX_NUM_CPU_DEVICES") or (asked[1] if asked else "")
    if devices.isdecimal() and int(devices) > 1:
        os.environ.setdefault("NPROC", str(4 * int(devices)))
