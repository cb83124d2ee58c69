"""The lower convex hull of a set of points, restricted to its decreasing part."""

from __future__ import annotations

from collections.abc import Sequence


def lower_hull(places: Sequence[float], values: Sequence[float]) -> list[int]:
    """Return the corners of the decreasing part of the lower convex hull (Andrew's monotone chain).

    The hull ends at the lowest point, at the first of several.

    Args:
        places: x coordinates, ascending; at least one.
        values: y coordinates.

    Returns:
        Indices of the corners, ascending; the first point is always a corner.
    """
    corners: list[int] = []
    for i, value in enumerate(values):
        if corners and value >= values[corners[-1]]:
            continue  # not below the last corner
        while len(corners) > 1:
            first, middle = corners[-2], corners[-1]
            fall = (values[first] - values[middle]) * (places[i] - places[middle])
            if fall > (values[middle] - value) * (places[middle] - places[first]):
                break
            corners.pop()
        corners.append(i)
    return corners
