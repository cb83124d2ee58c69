"""One architecture in a process of its own, with a limit of time and of memory."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.architectures.checks import run
from tests.architectures.registry import Architecture
from tests.architectures.results import Result

SECONDS = 180
MEMORY = 8 << 30
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.architectures.preload"])


@dataclass(frozen=True)
class _Running:
    each: Architecture
    process: BaseProcess
    results: Connection
    end: float


def run_all(
    chosen: Sequence[Architecture], processes: int
) -> Iterator[tuple[Architecture, Result]]:
    """Yield each architecture with its result, in the order in which they end.

    Args:
        chosen: what to run.
        processes: how many run at a time.
    """
    waiting, running = list(reversed(chosen)), list[_Running]()
    while waiting or running:
        while waiting and len(running) < processes:
            running.append(_start(waiting.pop()))
        ready = wait([job.results for job in running], timeout=1)
        for job in list(running):
            late = time.monotonic() > job.end
            if job.results in ready or late:
                running.remove(job)
                yield job.each, _result(job, late and job.results not in ready)


def _start(each: Architecture) -> _Running:
    results, sender = _FORKS.Pipe(duplex=False)
    process = _FORKS.Process(target=_run, args=(each, sender))
    process.start()
    sender.close()
    return _Running(each, process, results, time.monotonic() + SECONDS)


def _result(job: _Running, late: bool) -> Result:
    """Return what a process sent, or why it sent nothing."""
    try:
        if late:
            return Result("fails", "process", f"It did not end within {SECONDS} s.")
        found: Result = job.results.recv()
        return found
    except EOFError:
        job.process.join(5)
        code = job.process.exitcode or 0
        why = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return Result("fails", "process", f"Its process ended with {why}.")
    finally:
        job.process.kill()
        job.process.join()


def _run(each: Architecture, results: Connection) -> None:
    """Be the process of an architecture."""
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    with tempfile.TemporaryDirectory(prefix="hisvd-architecture-") as folder:
        os.environ["HISVD_CACHE"] = f"{folder}/cache"
        results.send(run(each, Path(folder)))
