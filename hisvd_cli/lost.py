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
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from hisvd_cli.distributed import launched_rank
from hisvd_cli.errors import HisvdError, LostProcessError

if TYPE_CHECKING:
    from torch import distributed

_LOOK_SECONDS = 1.0  # between two looks of every process at whether another has failed
_ROLL_SECONDS = 3.0  # in which a process that lives gives its number
_STORE_SECONDS = 60.0
_TELLER = "hisvd-teller"
_HINT = (
    "Run the same command again, with any number of processes: finished blocks are kept. Out of "
    "memory? Lower --batch, --seqlen or --samples."
)
_ending = threading.Lock()


def connect() -> distributed.TCPStore:
    """Return a new connection to the key-value store of the processes."""
    from torch.distributed.rendezvous import rendezvous

    store: distributed.TCPStore = next(
        iter(rendezvous("env://", timeout=timedelta(seconds=_STORE_SECONDS)))
    )[0]
    return store


def end(error: HisvdError, tell: Callable[[HisvdError], None]) -> NoReturn:
    """End this process for an error, told once among all processes.

    Nothing is cleaned up behind the error: what would wait for dead processes must not.

    Args:
        error: why it ends.
        tell: prints an error.
    """
    with _ending:  # never given back: a second thread with the same trouble waits for the exit
        with suppress(RuntimeError):  # no store any more: whoever held it has told why
            store = connect()
            rank, size = launched_rank(), int(os.environ["WORLD_SIZE"])
            store.set(_present(rank), "")
            # Where nobody has told yet, this process does.
            if store.compare_set(_TELLER, "", str(rank)).decode() == str(rank):
                lost = isinstance(error, LostProcessError)
                tell(_who_is_missing(store, size) if lost else error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code)


def _present(rank: int) -> str:
    return f"hisvd-present-{rank}"


def _who_is_missing(store: distributed.TCPStore, size: int) -> LostProcessError:
    """Wait for the numbers of all processes that live, and return what to tell of the others."""
    missing = list(range(size))
    deadline = time.monotonic() + _ROLL_SECONDS
    while missing and time.monotonic() < deadline:
        time.sleep(0.05)
        missing = [rank for rank in missing if not store.check([_present(rank)])]
    if not missing:
        return LostProcessError("The run was ended from outside (SIGTERM).", _HINT)
    ranks = f"Rank {missing[0]}" if len(missing) == 1 else f"Ranks {', '.join(map(str, missing))}"
    return LostProcessError(
        f"{ranks} of {size} died without a word: killed, or out of memory.", _HINT
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
    threading.Thread(target=_watch, args=(woken, over, tell), daemon=True).start()
    yield
    # Not after an error: a process that is about to tell it must outlive torchrun's SIGTERM.
    over.set()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _watch(woken: int, over: threading.Event, tell: Callable[[HisvdError], None]) -> None:
    store = connect()
    while not over.is_set():
        terminated = False
        if select.select([woken], [], [], _LOOK_SECONDS)[0]:
            terminated = signal.SIGTERM in os.read(woken, 64)
        try:
            failed = terminated or store.check([_TELLER])
        except RuntimeError:  # the launcher has gone
            failed = not over.wait(_LOOK_SECONDS)
        if failed and not over.is_set():
            end(LostProcessError("Another process of this run has ended."), tell)
