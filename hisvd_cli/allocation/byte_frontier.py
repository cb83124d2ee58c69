"""What other ways to spend the same bytes would lose: one kind of saving alone, and the layouts of
two published methods, with what they claim and what their files take.

``16 bit ranks`` are plain pairs that are not rounded, ``16 bit pivoted`` the same in that storage.
All have the ranks that lose least under what they count, and hisvd's own rounding: the layouts are
compared, not the methods' allocations. k is a rank, ``(m, n)`` a shape; numbers are of 16 bits.

``dobi-svd remap``
    Dobi-SVD (ICLR 2025, arXiv 2502.02723; its program's ``modules/remapping.py``): of both vectors
    of a component the first min(m, n) numbers have 8 bits, the rest of the longer one has 16, so
    that rank k counts as k·max(m, n) numbers, and every rank up to the full one saves something.
    Its files hold that, and two float16 scales a component besides: 2k·max(m, n) + 4k bytes.
``zs-svd remap``
    Zero Sum SVD (ICML 2026, arXiv 2602.02848; ``--remap`` of its program) counts the same and
    rounds the same numbers, but writes them back into a pair of 16 bits, 2k(m + n) bytes; what
    loses no component stays dense as it is.
``zs-svd half``
    Its half-prune-then-quantize (``--quantize_8_bit``): twice the ratio (1 at most) of the
    parameters is kept, then every number has 8 bits, with a float16 scale a row that is not
    counted.
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

JOINT = "joint"
BUDGETS = (0.5, 0.4, 0.3, 0.2)
"""Bytes ratios at which ways are compared, beside the one that is asked for."""


@dataclass(frozen=True)
class Point:
    """What one way to spend bytes would come to.

    Attributes:
        method: its name.
        budget: the bytes ratio that it claims; None for one that has no choice.
        bytes_ratio: the bytes ratio that its files have.
        predicted_loss: what it loses.
    """

    method: str
    budget: float | None
    bytes_ratio: float
    predicted_loss: float


@dataclass(frozen=True)
class _Way:
    """A way to spend bytes: what a sublayer may choose, and what files take for a choice."""

    options: Callable[[Candidate], list[Choice]]
    taken: Callable[[Candidate, Choice], int]


def frontier(
    candidates: Sequence[Candidate],
    budgets: Mapping[float, int],
    group: int,
    step: int,
    rest: int = 0,
) -> list[Point]:
    """Return the points of each way at each budget that it can keep to, in a fixed order.

    Args:
        candidates: the sublayers.
        budgets: bytes ratio → bytes that all of them may take.
        group: numbers that share a scale, with 4 bits.
        step: ranks are multiples of this.
        rest: bytes of what stays as it is, where ratios count that too.
    """
    full = sum(c.full_bytes for c in candidates)
    points = []
    for name, way in _ways(candidates, group, step).items():
        options = [way.options(c) for c in candidates]
        for ratio, budget in sorted(budgets.items(), reverse=True):
            if least_price(options) <= budget:
                chosen = spend(options, budget)
                pairs = zip(candidates, chosen, strict=True)
                taken = sum(way.taken(candidate, choice) for candidate, choice in pairs)
                loss = sum(choice.loss for choice in chosen)
                points.append(Point(name, ratio, (rest + taken) / (rest + full), loss))
    for bits in BITS[1:]:
        taken = sum(stored_bytes(c.shape, full_rank(c.shape), bits, group, 0) for c in candidates)
        loss = sum(c.dense_loss(bits) for c in candidates)
        points.append(Point(f"int{bits} dense", None, (rest + taken) / (rest + full), loss))
    return points


def _ways(candidates: Sequence[Candidate], group: int, step: int) -> dict[str, _Way]:
    def counted(_candidate: Candidate, choice: Choice) -> int:
        return choice.price

    ways = {
        JOINT: _Way(lambda c: choices(c, BITS, group, step), counted),
        "16 bit ranks": _Way(lambda c: choices(c, BITS[:1], group, step), counted),
        "16 bit pivoted": _Way(lambda c: _pivoted(c, step), counted),
    }
    if all(c.width == 2 for c in candidates):  # the published ones start from 16 bits
        ways |= {
            "dobi-svd remap": _Way(
                lambda c: _remapped(c, step), lambda _c, choice: choice.price + 4 * choice.rank
            ),
            "zs-svd remap": _Way(
                lambda c: _remapped(c, step, whole=True),
                lambda c, choice: stored_bytes(c.shape, choice.rank, FULL_BITS, group, c.width),
            ),
            "zs-svd half": _Way(
                lambda c: _halved(c, step),
                lambda c, choice: stored_bytes(c.shape, choice.rank, choice.bits, group, c.width),
            ),
        }
    return ways


def _pivoted(candidate: Candidate, step: int) -> list[Choice]:
    """Return what a sublayer in pivoted storage may choose, its order of rows 4 bytes each."""
    shape, full, losses = candidate.shape, full_rank(candidate.shape), candidate.truncated()
    found = [Choice(full, FULL_BITS, candidate.full_bytes, 0.0)]
    for rank in range(candidate.floor, full, step):
        numbers = int(cost(rank, shape, "pivoted")) - shape[0]
        price = numbers * candidate.width + 4 * shape[0]
        if price < candidate.full_bytes and not is_dense(rank, shape, "pivoted"):
            found.append(Choice(rank, FULL_BITS, price, float(losses[rank])))
    return falling(found)


def _remapped(candidate: Candidate, step: int, whole: bool = False) -> list[Choice]:
    """Return what a remapped sublayer may choose; ``whole`` leaves the full rank as it is."""
    (m, n), full = candidate.shape, full_rank(candidate.shape)
    # Of U, [m, k], min(m, n) rows are rounded; of V, [k, n], so many columns.
    rounded = full / m * candidate.noise_of_u(8) + full / n * candidate.noise_of_v(8)
    losses = (candidate.truncated() + rounded).tolist()
    price = 2 * max(m, n)
    found = [Choice(r, 8, price * r, losses[r]) for r in range(candidate.floor, full, step)]
    last = Choice(full, FULL_BITS, price * full, 0.0) if whole else None
    return falling([*found, last or Choice(full, 8, price * full, losses[full])])


def _halved(candidate: Candidate, step: int) -> list[Choice]:
    """Return what a sublayer of numbers of a byte each may choose, scales not counted."""
    shape, full, losses = candidate.shape, full_rank(candidate.shape), candidate.losses(8).tolist()
    ranks = range(candidate.floor, full, step)
    found = [Choice(r, 8, int(cost(r, shape)), losses[r]) for r in ranks if not is_dense(r, shape)]
    return falling([*found, Choice(full, 8, shape[0] * shape[1], candidate.dense_loss(8))])
