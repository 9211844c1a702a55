"""SIGTERM and SIGINT as a request to save and stop."""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Stop:
    """Whether a signal asked the run to stop, and which."""

    requested: bool = False
    name: str = ""


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Turns the first SIGTERM or SIGINT into a request; a second one ends the process at once (status 128 + number)."""
    stop = Stop()

    def request(number, _frame):
        if stop.requested:
            os._exit(128 + number)
        stop.requested, stop.name = True, signal.Signals(number).name
        with contextlib.suppress(OSError):  # what reads our messages may be gone already (| tee)
            os.write(2, f"\n{stop.name}: finishing this step, then saving (again: stop at once)\n".encode())

    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread: signals are the caller's business
        before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
