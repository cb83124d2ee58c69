"""How fast a sublayer is factored, and how near to the optimum: beside the usual ways.

For each shape and keep ratio, from the second moment that calibration keeps (of the output where
that is the smaller side, else of the input), in one process, medians of some runs:

- ``hisvd``: the decomposer ``whitened``
- ``cholesky + svd``: ``torch.linalg.svd`` of W L, with G = L Lᵀ known
- ``svd_lowrank``: ``torch.svd_lowrank`` of W L with 10 oversamples and 2 iterations (RSVD-LLM)

Weights and inputs are random; 64 directions hold most of the inputs' energy, and what keep 0.6 cuts
off holds some hundredths of it, as in the attention layers of SmolLM2. Loss is ``tr(Δ G Δᵀ)`` in
float64, relative to the optimum that eigenvalues in float64 give::

    python tests/benchmarks/decompose.py --threads 2 --output tests/benchmarks/decompose.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hisvd_cli.allocation.budget import break_even
from hisvd_cli.allocation.energies import whitened_energy
from hisvd_cli.compression.methods import DECOMPOSERS
from hisvd_cli.linalg.moments import Moment
from hisvd_cli.linalg.statistics import Statistics

SHAPES = [(576, 576), (4096, 4096), (4096, 11008), (11008, 4096)]
RATIOS = [0.8, 0.6, 0.4]
Pair = tuple[Tensor, Tensor]


def draw(shape: tuple[int, int], seed: int) -> Pair:
    """Return W ``[m, n]`` and G ``[n, n]`` in float32."""
    n = shape[1]
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -1, n)[torch.randperm(n, generator=generator)]
    tokens = torch.randn(2 * n, n, generator=generator) * scales
    shared = torch.randn(64, n, generator=generator) / 5
    tokens += torch.randn(2 * n, 64, generator=generator) @ shared
    return torch.randn(shape, generator=generator) / n**0.5, tokens.T @ tokens / (2 * n)


def cholesky_svd(weight: Tensor, moment: Tensor, rank: int) -> Pair:
    """Factor as SVD-LLM does: the SVD of W L, and L undone on the right."""
    root = torch.linalg.cholesky(moment)
    u, sigma, v = torch.linalg.svd(weight @ root, full_matrices=False)
    right = torch.linalg.solve_triangular(root.T, v[:rank].T, upper=True).T
    return u[:, :rank] * sigma[:rank], right


def svd_lowrank(weight: Tensor, moment: Tensor, rank: int) -> Pair:
    """Factor as RSVD-LLM does."""
    root = torch.linalg.cholesky(moment)
    u, sigma, v = torch.svd_lowrank(weight @ root, q=rank + 10, niter=2)
    right = torch.linalg.solve_triangular(root.T, v[:, :rank], upper=True).T
    return u[:, :rank] * sigma[:rank], right


def seconds_of(work: Callable[[], Pair], repeats: int) -> tuple[float, Pair]:
    """Return the median time of some runs, and what the last one returned."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        made = work()
        times.append(time.perf_counter() - started)
    return median(times), made


def loss_of(weight: Tensor, moment: Tensor, made: Pair) -> float:
    """Return tr(Δ G Δᵀ) in float64."""
    error = weight.double() - made[0].double() @ made[1].double()
    return float(((error @ moment.double()) * error).sum())


def measure(shape: tuple[int, int], repeats: int) -> Iterator[dict[str, Any]]:
    """Print a line for each ratio, and yield what it says."""
    weight, moment = draw(shape, seed=0)
    m, n = shape
    product = weight @ moment @ weight.T
    known = Moment(product, "output") if m < n else Moment(moment, "input")
    energies = whitened_energy(weight, known)
    whitened = DECOMPOSERS.get("whitened")
    # The whole SVD is made at any rank, and takes so long that one run of a large one must do.
    usual, _ = seconds_of(lambda: cholesky_svd(weight, moment, 1), repeats if m < 1000 else 1)
    for ratio in RATIOS:
        rank = int(ratio * break_even(shape))
        best = float(energies[rank:].sum())
        own, made = seconds_of(lambda r=rank: whitened(weight, Statistics(known), r), repeats)  # type: ignore[misc]
        drawn, random = seconds_of(lambda r=rank: svd_lowrank(weight, moment, r), repeats)  # type: ignore[misc]
        losses = [loss_of(weight, moment, pair) / best - 1 for pair in (made, random)]
        sys.stdout.write(
            f"{m}×{n} keep {ratio:g} (rank {rank}): hisvd {own:.2f} s, loss {losses[0]:+.3%}; "
            f"cholesky + svd {usual:.2f} s ({usual / own:.1f} ×); "
            f"svd_lowrank {drawn:.2f} s ({drawn / own:.1f} ×), loss {losses[1]:+.2%}\n"
        )
        sys.stdout.flush()
        yield {
            "shape": shape,
            "ratio": ratio,
            "rank": rank,
            "seconds": {"hisvd": own, "cholesky + svd": usual, "svd_lowrank": drawn},
            "excess_loss": {"hisvd": losses[0], "svd_lowrank": losses[1]},
        }


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=[f"{m}x{n}" for m, n in SHAPES])
    parser.add_argument("--output", type=Path, help="a .json file, written again after each shape")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows: list[dict[str, Any]] = []
    for shape in given.shapes:
        m, n = map(int, shape.split("x"))
        rows += measure((m, n), given.repeats)
        if given.output:
            document = {"threads": given.threads, "dtype": "float32", "cases": rows}
            given.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
