"""How fast a run goes: bytes per second, model FLOPs, utilisation, time left."""

import contextlib
import time

import jax

from bytelm.config import Config
from bytelm.devices import find_chip
from bytelm.models.flops import TRAIN_FACTOR


class Speed:
    """Rates since the last measurement, pauses (evaluation, saving) taken out.

    Utilisation is useful FLOPs over the device's nominal 16-bit rate (where devices.py knows it) and over the matmul
    rate measured at the start in the run's own compute type.
    """

    def __init__(self, config: Config, devices: int, step: int, seen: int, matmul_rate: float):
        """`step` and `seen`: where the run stands now; `matmul_rate`: FLOP/s measured on one device."""
        self.device = jax.devices()[0].device_kind
        self.measured = matmul_rate
        self._chip = find_chip(self.device)
        self._devices, self._steps = devices, config.train.steps
        self._time, self._seen, self._step = time.monotonic(), seen, step
        self._seconds_per_step, self._compiling = 0.0, True

    def measure(self, step: int, seen: int, forward_flops: float) -> dict[str, float]:
        """bytes_per_second, train_flops_per_byte, flops_per_second, utilization_measured, utilization_nominal (if
        known), seconds_left; `forward_flops`: the useful forward FLOPs a byte of this step.

        Nothing the first time: that interval holds the compilation.
        """
        now = time.monotonic()
        seconds, steps = max(now - self._time, 1e-9), max(step - self._step, 1)
        flops = TRAIN_FACTOR * forward_flops
        rate, recent = (seen - self._seen) / seconds, seconds / steps
        self._time, self._seen, self._step = now, seen, step
        if self._compiling:
            self._compiling = False
            return {}
        if self._seconds_per_step:
            recent = self._seconds_per_step + 0.3 * (recent - self._seconds_per_step)
        self._seconds_per_step = recent
        out = {
            "bytes_per_second": rate,
            "train_flops_per_byte": flops,
            "flops_per_second": rate * flops,
            "utilization_measured": rate * flops / self._devices / self.measured,
            "seconds_left": (self._steps - step) * recent,
        }
        if self._chip:
            out["utilization_nominal"] = rate * flops / self._devices / self._chip.flops
        return out

    @contextlib.contextmanager
    def paused(self):
        """Time spent in here does not count."""
        start = time.monotonic()
        yield
        self._time += time.monotonic() - start
