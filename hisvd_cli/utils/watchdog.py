"""Ends all processes of a distributed run soon after one fails, with a single error message.

A process that fails with an error prints it. If a process is killed, the others notice a closed
connection or the SIGTERM that torchrun sends. Each then writes its rank into torchrun's key-value
store; the first to do so waits briefly and reports the ranks that are missing.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from hisvd_cli.utils.errors import HisvdError, LostProcessError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # not in its __all__

_POLL_SECONDS = 1.0  # between two checks whether another process has failed
_ROLL_CALL_SECONDS = 3.0  # time in which every live process writes its rank
_STORE_SECONDS = 30.0
_REPORTER = "hisvd-reporter"
_ending = threading.Lock()


def connect() -> Store:
    """Return a new connection to torchrun's key-value store."""
    from torch.distributed.rendezvous import rendezvous

    store: Store = next(iter(rendezvous("env://", timeout=timedelta(seconds=_STORE_SECONDS))))[0]
    return store


def end(error: HisvdError, show: Callable[[HisvdError], None]) -> NoReturn:
    """Exit this process with an error that is printed once among all processes.

    Exits without cleanup, which could wait for processes that have died.

    Args:
        error: the reason.
        show: prints an error.
    """
    with _ending:  # never released: a second thread that fails too waits here for the exit
        final: HisvdError | None = error
        with suppress(RuntimeError):  # without the store, every process prints its error
            final = _error_to_show(connect(), error)
        if final is not None:
            show(final)
        os._exit(error.exit_code)


def _error_to_show(store: Store, error: HisvdError) -> HisvdError | None:
    """Return the error that this process prints; None if another process prints one."""
    rank, size = os.environ["RANK"], int(os.environ["WORLD_SIZE"])  # torchrun sets them
    store.set(_present(int(rank)), "")
    if store.compare_set(_REPORTER, "", rank).decode() != rank:
        return None
    return _who_is_missing(store, size) if isinstance(error, LostProcessError) else error


def _present(rank: int) -> str:
    return f"hisvd-present-{rank}"


def _who_is_missing(store: Store, size: int) -> LostProcessError:
    """Wait for the ranks of all live processes, and return the error that names the others."""
    missing = list(range(size))
    deadline = time.monotonic() + _ROLL_CALL_SECONDS
    while missing and time.monotonic() < deadline:
        time.sleep(0.05)
        missing = [rank for rank in missing if not store.check([_present(rank)])]
    if not missing:
        return LostProcessError("The run was terminated (SIGTERM).")
    ranks = f"Rank {missing[0]}" if len(missing) == 1 else f"Ranks {', '.join(map(str, missing))}"
    return LostProcessError(
        f"{ranks} of {size} exited without an error message: killed or out of memory."
    )


@contextmanager
def guarding(show: Callable[[HisvdError], None]) -> Iterator[None]:
    """Exit this process if another process fails while the body runs.

    Args:
        show: prints an error.
    """
    over = threading.Event()
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    # The signal number is written to the pipe even during a long computation in the main thread.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(woken, over, show), daemon=True)
    watcher.start()
    yield
    # Skipped after an error: a process that still has to print it must survive torchrun's SIGTERM.
    over.set()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.write(waker, b"\0")
    # The interpreter aborts (SIGABRT) if it exits while a daemon thread runs the store's C++ code.
    watcher.join()
    os.close(woken)
    os.close(waker)


def _watch(woken: int, over: threading.Event, show: Callable[[HisvdError], None]) -> None:
    store = connect()
    while True:
        terminated = False
        if select.select([woken], [], [], _POLL_SECONDS)[0]:
            terminated = signal.SIGTERM in os.read(woken, 64)
        if over.is_set():
            return
        try:
            if (terminated or store.check([_REPORTER])) and not over.is_set():
                end(LostProcessError(), show)
        except RuntimeError:
            if not over.wait(_POLL_SECONDS):
                end(LostProcessError("torchrun, which started this run, has exited."), show)
