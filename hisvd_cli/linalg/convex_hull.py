"""The largest convex, falling curve below a set of points."""

from __future__ import annotations

from collections.abc import Sequence


def lower_hull(places: Sequence[float], values: Sequence[float]) -> list[int]:
    """Return which points are corners of the largest convex, falling curve below all.

    Points behind the lowest one, where the curve would rise, are left out; of equally low ones the
    first is kept (Andrew's monotone chain).

    Args:
        places: where each point is, rising; at least one.
        values: how high it is.

    Returns:
        Indices, rising; the first point is always a corner.
    """
    corners: list[int] = []
    for i, value in enumerate(values):
        if corners and value >= values[corners[-1]]:
            continue  # the curve stays level or a later point ends it
        while len(corners) > 1:
            first, middle = corners[-2], corners[-1]
            fall = (values[first] - values[middle]) * (places[i] - places[middle])
            if fall > (values[middle] - value) * (places[middle] - places[first]):
                break
            corners.pop()
        corners.append(i)
    return corners
