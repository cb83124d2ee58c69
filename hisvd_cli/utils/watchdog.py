"""How a run of several processes ends when one fails: all of them soon, and with one message.

The process that fails with an error of its own says it. Of one that is killed nothing is heard; the
others notice by a closed connection, or by the SIGTERM that torchrun sends to all that remain.
Each then writes its number into torchrun's key-value store, and the first to do so waits a
little, and says whose number is missing.
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

_LOOK_SECONDS = 1.0  # between two looks of every process at whether another has failed
_ROLL_SECONDS = 3.0  # in which a process that lives gives its number
_STORE_SECONDS = 30.0
_TELLER = "hisvd-teller"
_ending = threading.Lock()


def connect() -> Store:
    """Return a new connection to the key-value store of the processes."""
    from torch.distributed.rendezvous import rendezvous

    store: Store = next(iter(rendezvous("env://", timeout=timedelta(seconds=_STORE_SECONDS))))[0]
    return store


def end(error: HisvdError, tell: Callable[[HisvdError], None]) -> NoReturn:
    """End this process for an error, told once among all processes.

    Nothing is cleaned up behind the error: what would wait for dead processes must not.

    Args:
        error: why it ends.
        tell: prints an error.
    """
    with _ending:  # never given back: a second thread with the same trouble waits for the exit
        final: HisvdError | None = error
        with suppress(RuntimeError):  # without a store all tell, rather than none
            final = _last_word(connect(), error)
        if final is not None:
            tell(final)
        os._exit(error.exit_code)


def _last_word(store: Store, error: HisvdError) -> HisvdError | None:
    """Return what this process tells of an error; None where another one tells."""
    rank, size = os.environ["RANK"], int(os.environ["WORLD_SIZE"])  # torchrun sets them
    store.set(_present(int(rank)), "")
    if store.compare_set(_TELLER, "", rank).decode() != rank:
        return None
    return _who_is_missing(store, size) if isinstance(error, LostProcessError) else error


def _present(rank: int) -> str:
    return f"hisvd-present-{rank}"


def _who_is_missing(store: Store, size: int) -> LostProcessError:
    """Wait for the numbers of all processes that live, and return what to tell of the others."""
    missing = list(range(size))
    deadline = time.monotonic() + _ROLL_SECONDS
    while missing and time.monotonic() < deadline:
        time.sleep(0.05)
        missing = [rank for rank in missing if not store.check([_present(rank)])]
    if not missing:
        return LostProcessError("The run was ended from outside (SIGTERM).")
    ranks = f"Rank {missing[0]}" if len(missing) == 1 else f"Ranks {', '.join(map(str, missing))}"
    return LostProcessError(
        f"{ranks} of {size} exited without an error message: killed, or out of memory."
    )


@contextmanager
def guarding(tell: Callable[[HisvdError], None]) -> Iterator[None]:
    """End this process, whatever it is doing, as soon as another has failed while the body runs.

    Args:
        tell: prints an error.
    """
    over = threading.Event()
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    # The signal's number goes to the pipe even while the main thread is in a long computation.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(woken, over, tell), daemon=True)
    watcher.start()
    yield
    # Not after an error: a process that is about to tell it must outlive torchrun's SIGTERM.
    over.set()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.write(waker, b"\0")
    # An interpreter that ends while a daemon thread is in the store's C++ code aborts (SIGABRT).
    watcher.join()
    os.close(woken)
    os.close(waker)


def _watch(woken: int, over: threading.Event, tell: Callable[[HisvdError], None]) -> None:
    store = connect()
    while True:
        terminated = False
        if select.select([woken], [], [], _LOOK_SECONDS)[0]:
            terminated = signal.SIGTERM in os.read(woken, 64)
        if over.is_set():
            return
        try:
            if (terminated or store.check([_TELLER])) and not over.is_set():
                end(LostProcessError(), tell)
        except RuntimeError:
            if not over.wait(_LOOK_SECONDS):
                end(LostProcessError("torchrun, which started this run, has ended."), tell)
