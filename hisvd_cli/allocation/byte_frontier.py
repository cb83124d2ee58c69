"""Predicted loss of other layouts with the same bytes: truncation alone, and the layouts of two
published methods, with their claimed sizes and the sizes of their files.

``16 bit ranks`` are plain pairs without rounding, ``16 bit pivoted`` the same in pivoted storage.
All use the ranks of least loss under their own count, and the rounding of hisvd: the comparison is
between layouts, not between allocations. k is a rank, ``(m, n)`` a shape; numbers have 16 bits.
Stacks of experts are plain pairs without rounding in every layout.

``dobi-svd remap``
    Dobi-SVD (ICLR 2025, arXiv 2502.02723; ``modules/remapping.py`` of the authors' code): in both
    vectors of a component, the first min(m, n) numbers have 8 bits, the rest of the longer one 16.
    Rank k counts as k·max(m, n) numbers, so every rank below full saves bytes. Files also contain
    two float16 scales per component: 2k·max(m, n) + 4k bytes.
``zs-svd remap``
    Zero Sum SVD (ICML 2026, arXiv 2602.02848; ``--remap`` of the authors' code): the same count and
    rounding, but stored as a pair with 16 bits, 2k(m + n) bytes. A sublayer that loses no component
    stays dense.
``zs-svd half``
    Its half-prune-then-quantize (``--quantize_8_bit``): twice the ratio (at most 1) of the
    parameters is kept with 8 bits per number. One float16 scale per row is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hisvd_cli.allocation.budget import cost, full_rank, is_dense
from hisvd_cli.allocation.byte_budget import (
    BITS,
    FULL_BITS,
    Candidate,
    Choice,
    choices,
    falling,
    least_price,
    spend,
    stored_bytes,
)
from hisvd_cli.modeling.layers.shapes import is_stack, matrix_of, numel

JOINT = "joint"
_RANKS = "16 bit ranks"
BUDGETS = (0.5, 0.4, 0.3, 0.2)
"""Bytes ratios of the comparison, besides the requested one."""


@dataclass(frozen=True)
class Point:
    """Size and predicted loss of one layout at one budget.

    Attributes:
        method: name of the layout.
        budget: the claimed bytes ratio; None if the layout has a fixed size.
        bytes_ratio: the bytes ratio of the files.
        predicted_loss: the predicted loss.
    """

    method: str
    budget: float | None
    bytes_ratio: float
    predicted_loss: float


@dataclass(frozen=True)
class _Layout:
    """A layout: the choices of a sublayer, and the bytes of a choice on disk."""

    options: Callable[[Candidate], list[Choice]]
    taken: Callable[[Candidate, Choice], int]


def frontier(
    candidates: Sequence[Candidate],
    budgets: Mapping[float, int],
    group: int,
    step: int,
    rest: int = 0,
) -> list[Point]:
    """Return the points of each layout at each budget that it can meet, in a fixed order.

    Args:
        candidates: the sublayers.
        budgets: bytes ratio → maximum bytes of all sublayers.
        group: numbers that share a scale at 4 bits.
        step: ranks are multiples of this.
        rest: bytes of uncompressed tensors, if ratios count them.
    """
    full = sum(c.full_bytes for c in candidates)
    points = []
    layouts = _layouts(candidates, group, step)
    for name, layout in layouts.items():
        used = [layouts[_RANKS] if is_stack(c.shape) else layout for c in candidates]
        options = [own.options(c) for own, c in zip(used, candidates, strict=True)]
        for ratio, budget in sorted(budgets.items(), reverse=True):
            if least_price(options) <= budget:
                chosen = spend(options, budget)
                taken = sum(
                    own.taken(candidate, choice)
                    for own, candidate, choice in zip(used, candidates, chosen, strict=True)
                )
                loss = sum(choice.loss for choice in chosen)
                points.append(Point(name, ratio, (rest + taken) / (rest + full), loss))
    for bits in BITS[1:]:
        taken = sum(
            stored_bytes(c.shape, full_rank(c.shape), bits, group, c.width) for c in candidates
        )
        loss = sum(c.dense_loss(bits) for c in candidates)
        points.append(Point(f"int{bits} dense", None, (rest + taken) / (rest + full), loss))
    return points


def _layouts(candidates: Sequence[Candidate], group: int, step: int) -> dict[str, _Layout]:
    def counted(_candidate: Candidate, choice: Choice) -> int:
        return choice.price

    layouts = {
        JOINT: _Layout(lambda c: choices(c, BITS, group, step), counted),
        _RANKS: _Layout(lambda c: choices(c, BITS[:1], group, step), counted),
        "16 bit pivoted": _Layout(lambda c: _pivoted(c, step), counted),
    }
    if all(c.width == 2 for c in candidates):  # the published layouts are defined for 16 bits
        layouts |= {
            "dobi-svd remap": _Layout(
                lambda c: _remapped(c, step), lambda _c, choice: choice.price + 4 * choice.rank
            ),
            "zs-svd remap": _Layout(
                lambda c: _remapped(c, step, whole=True),
                lambda c, choice: stored_bytes(c.shape, choice.rank, FULL_BITS, group, c.width),
            ),
            "zs-svd half": _Layout(
                lambda c: _halved(c, step),
                lambda c, choice: stored_bytes(c.shape, choice.rank, choice.bits, group, c.width),
            ),
        }
    return layouts


def _pivoted(candidate: Candidate, step: int) -> list[Choice]:
    """Return the choices of a sublayer in pivoted storage, with row indices of 4 bytes."""
    shape, full, losses = candidate.shape, full_rank(candidate.shape), candidate.truncated()
    found = [Choice(full, FULL_BITS, candidate.full_bytes, 0.0)]
    for rank in range(candidate.floor, full, step):
        numbers = int(cost(rank, shape, "pivoted")) - shape[0]
        price = numbers * candidate.width + 4 * shape[0]
        if price < candidate.full_bytes and not is_dense(rank, shape, "pivoted"):
            found.append(Choice(rank, FULL_BITS, price, float(losses[rank])))
    return falling(found)


def _remapped(candidate: Candidate, step: int, whole: bool = False) -> list[Choice]:
    """Return the choices of a remapped sublayer; ``whole`` does not round full rank."""
    (m, n), full = matrix_of(candidate.shape), full_rank(candidate.shape)
    # min(m, n) rows of U [m, k] and columns of V [k, n] are rounded.
    rounded = full / m * candidate.noise_of_u(8) + full / n * candidate.noise_of_v(8)
    losses = (candidate.truncated() + rounded).tolist()
    price = 2 * max(m, n)
    found = [Choice(r, 8, price * r, losses[r]) for r in range(candidate.floor, full, step)]
    last = Choice(full, FULL_BITS, price * full, 0.0) if whole else None
    return falling([*found, last or Choice(full, 8, price * full, losses[full])])


def _halved(candidate: Candidate, step: int) -> list[Choice]:
    """Return the choices of a sublayer with 8 bits per number, without scales."""
    shape, full, losses = candidate.shape, full_rank(candidate.shape), candidate.losses(8).tolist()
    ranks = range(candidate.floor, full, step)
    found = [Choice(r, 8, int(cost(r, shape)), losses[r]) for r in ranks if not is_dense(r, shape)]
    return falling([*found, Choice(full, 8, numel(shape), candidate.dense_loss(8))])
