"""Prepares the next item in a thread while the current one is processed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Yield each item with the result of ``work``, which runs in a thread, one item ahead.

    Raises:
        Exception: what ``work`` raises for an item, when that item is due.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: tuple[Item, Future[Result]] | None = None
        for item in items:
            following = item, pool.submit(work, item)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()
