"""Eight fake CPU devices, a compilation cache, runtime type checks of every annotated bytelm function."""

import gc
import importlib.util
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Eight fake devices on two busy cores: a collective may wait long for its turn, which XLA would take for a deadlock.
# And a device may wait in two of them (bytelm/xla_flags.py).
os.environ.setdefault("NPROC", "32")
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""), "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    "--xla_backend_optimization_level=1",  # compilation is most of the time; 0 would be faster, but rounds worse
])  # fmt: skip
sys.path.insert(0, str(Path(__file__).parent))

from jaxtyping import install_import_hook

hook = install_import_hook("bytelm", "typecheck.check")
hook.__enter__()

import jax  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

import bytelm  # noqa: E402, F401 (sets XLA's options)

CACHE = Path(os.environ.get("BYTELM_TEST_CACHE", "~/.cache/bytelm/test-xla")).expanduser()

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()

# orbax would have each of the eight fake devices cut its part out of every small array: a fifth of a run's time.
ocp.type_handlers.get_type_handler(jax.Array)._use_replica_parallel = False

ROOT = Path(__file__).resolve().parent.parent


MAPS = Path("/proc/self/maps")  # there is one on Linux


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs():
    """Forgets compiled programs before a process has more memory maps than Linux allows (65,530, a dozen or so for each
    program): XLA ends the process there."""
    yield
    if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def reference_python() -> str:
    """A Python with torch and transformers (extra `reference`): this one, or the one BYTELM_REFERENCE_PYTHON names."""
    named = os.environ.get("BYTELM_REFERENCE_PYTHON", "")
    if not named and not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        pytest.skip("needs torch and transformers: install the extra `reference`, or set BYTELM_REFERENCE_PYTHON")
    return named or sys.executable
