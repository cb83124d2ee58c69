"""Leading eigenvectors by ``linalg.tridiagonal`` beside scipy's driver for a subset, in turns.

``tridiagonal`` stays only while it is more than 1.3 × as fast as
``scipy.linalg.eigh(driver="evr", subset_by_index=…)``, which computes the same::

    OMP_NUM_THREADS=2 OPENBLAS_NUM_THREADS=2 python -m tests.benchmarks.tridiagonal

Prints one JSON line per size and share: seconds of both (medians), their ratio, and the largest
relative difference of the eigenvalues and of the projections onto the vectors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch
from scipy.linalg import eigh
from torch import Tensor

from hisvd_cli.linalg.tridiagonal import leading_part


def gram(size: int) -> Tensor:
    """Return the Gram matrix ``[size, size]`` of random rows whose scales fall like a spectrum."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(size, 2 * size, generator=generator)
    rows *= torch.logspace(0, -2, size)[:, None]
    return rows @ rows.T


def by_scipy(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues ``[k]`` and their vectors ``[p, k]``, in falling order."""
    first = len(matrix) - rank
    values, vectors = eigh(
        matrix.numpy(), driver="evr", subset_by_index=(first, len(matrix) - 1), check_finite=False
    )
    return torch.from_numpy(values).flip(0), torch.from_numpy(vectors).flip(1)


def measure(size: int, share: float, repeats: int) -> dict[str, Any]:
    """Time both in turns on one matrix."""
    matrix, rank = gram(size), int(size * share)
    ways = {"tridiagonal": leading_part, "scipy evr": by_scipy}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            result = way(matrix, rank)
            seconds[name].append(time.perf_counter() - started)
            assert result is not None
            found[name] = result
    (ours, our_vectors), (theirs, their_vectors) = found.values()
    probe = torch.randn(size, 4, generator=torch.Generator().manual_seed(1))
    projected = [v @ (v.T @ probe) for v in (our_vectors, their_vectors)]
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        **{"size": size, "rank": rank, "seconds": medians},
        "ratio": medians["scipy evr"] / medians["tridiagonal"],
        "values differ": float(((ours - theirs) / theirs).abs().max()),
        "projections differ": float((projected[0] - projected[1]).norm() / projected[0].norm()),
    }


def main() -> None:
    """Print a line of JSON for each size and share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.45])
    given = parser.parse_args()
    for size in given.sizes:
        for share in given.shares:
            sys.stdout.write(json.dumps(measure(size, share, given.repeats)) + "\n")


if __name__ == "__main__":
    main()
