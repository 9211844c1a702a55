"""Jobs on worker processes, of which one may die without taking the others' work with it."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Job = TypeVar("Job")


class JobDied:
    """The outcome of a job whose process died (a crash in a library, or killed for want of memory)."""


def run_jobs(function: Callable[[Job], Any], jobs: list[Job], workers: int) -> Iterator[tuple[Job, Any]]:
    """(job, outcome) as they are done; outcome is JobDied where its process died. 0 workers: in this process.

    Exceptions of `function` are raised here, and end what is still running.
    """
    if not workers:
        for job in jobs:
            yield job, function(job)
        return
    left = dict(enumerate(jobs))
    while left:
        running: dict[Future, int] = {}
        try:
            for number, outcome in _pool(function, left, workers, running):
                del left[number]
                yield jobs[number], outcome
        except BrokenProcessPool:  # of those that ran, the one that dies again when it is alone is to blame
            suspects = sorted(set(running.values()) & set(left))
            if not suspects:
                raise
            for number in suspects:
                job = left.pop(number)
                try:
                    ((_, outcome),) = _pool(function, {number: job}, 1, {})
                except BrokenProcessPool:
                    outcome = JobDied()
                yield job, outcome


def _pool(
    function: Callable[[Job], Any], jobs: dict[int, Job], workers: int, running: dict[Future, int]
) -> Iterator[tuple[int, Any]]:
    """`running` holds the jobs that were given out and not yielded yet."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_worker)
    waiting = list(jobs.items())
    try:
        while waiting or running:
            while waiting and len(running) < 2 * workers:
                number, job = waiting.pop(0)
                running[pool.submit(function, job)] = number
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                outcome = future.result()
                yield running.pop(future), outcome
    finally:
        for process in list((pool._processes or {}).values()):  # they may be in the middle of a long job
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def _worker() -> None:
    """Leaves Ctrl-C to the parent, and ends with it even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=exit_with, args=(parent.sentinel,), daemon=True).start()


def exit_with(sentinel: int) -> None:
    """Ends this process as soon as the one behind `sentinel` is gone."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
