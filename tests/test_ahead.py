"""Work that is done one item ahead."""

from __future__ import annotations

import threading

import pytest

from hisvd_cli.utils.prefetch import ahead


def test_the_next_item_is_ready_while_one_is_worked_on() -> None:
    started = {i: threading.Event() for i in range(4)}

    def work(item: int) -> int:
        started[item].set()
        return item * item

    for item, made in ahead(work, range(4)):
        assert made == item * item
        if item < 3:
            assert started[item + 1].wait(10)
        assert not any(started[i].is_set() for i in range(item + 2, 4))


def test_an_error_comes_in_its_turn() -> None:
    made = ahead(lambda item: 1 / item, [2, 1, 0, 3])
    assert [next(made), next(made)] == [(2, 0.5), (1, 1.0)]
    with pytest.raises(ZeroDivisionError):
        next(made)


def test_nothing_comes_of_nothing() -> None:
    assert list(ahead(str, [])) == []
