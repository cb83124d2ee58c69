"""Estimates of disk space, memory and time, from shapes and one short measurement.

Legend: m outputs and n inputs of a sublayer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hisvd_cli.calibration.workload import (
    Peak,
    Workload,
    calibration_peak,
    gradients_peak,
    parameters,
    squares,
)
from hisvd_cli.modeling.sublayers import Sublayer

_EIGH_FLOPS = 25  # eigendecomposition with vectors, in units of size³ at the rate of products


@dataclass(frozen=True)
class Estimate:
    """Resources of a calibration: bytes on disk, peak memory, seconds."""

    bytes: int
    peak: Peak
    seconds: float


def product_rate(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Return the measured rate of matrix products in FLOP/s; takes a fraction of a second."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    (a @ a).sum().item()
    count = 3
    started = time.perf_counter()
    for _ in range(count):
        b = a @ a
    b.sum().item()
    return count * 2 * size**3 / (time.perf_counter() - started)


def _seconds(work: Workload, passed: int, products: int) -> float:
    """Return the seconds of multiplying all tokens by ``passed`` weights, and of ``products``
    multiplications for moments per token."""
    forward = passed / product_rate(work.device, work.dtype)
    return 2 * work.tokens * (forward + products / product_rate(work.device, torch.float32))


def estimate_calibration(work: Workload) -> Estimate:
    """Return an upper estimate of a calibration, see :mod:`hisvd_cli.calibration.workload`."""
    count = squares(work.sublayers)
    seconds = _seconds(work, parameters(work.sublayers), count)
    return Estimate(4 * count, calibration_peak(work), seconds)


def estimate_gradients(work: Workload, weights: bool) -> Estimate:
    """Return an estimate of collecting gradients after a calibration.

    Args:
        work: the workload; all parameters outside sublayers are counted as the head.
        weights: whether weight gradients are collected too.
    """
    shapes = [s.shape for s in work.sublayers]
    # Forward and backward through every block and the head; gradients of tall weights are also
    # propagated to the input.
    passed = 2 * parameters(work.sublayers) + 3 * work.outside_parameters
    passed += sum(m * n for m, n in shapes if m > n)
    count = squares(work.sublayers)
    products = 2 * count  # H, and again H and G for half of the text
    whole = 0
    if weights:
        whole = sum(m * n + m * m + n * n for m, n in shapes)
        products += parameters(work.sublayers)
        products += sum(m * n * (m + n) for m, n in shapes) // work.seqlen
    seconds = _seconds(work, passed, products)
    return Estimate(4 * (3 * count + whole), gradients_peak(work, weights), seconds)


def estimate_update(work: Workload) -> float:
    """Return the seconds of the forward passes of an update through both models, without factoring.

    A block runs to each of about four distinct inputs of its sublayers, half of it on average, and
    once to its end; C and G′ are counted for every sublayer.
    """
    products = sum(2 * s.shape[1] ** 2 for s in work.sublayers)
    return _seconds(work, 2 * 3 * parameters(work.sublayers), products)


def estimate_measuring(parameters: int, tokens: int, passes: float, rate: float) -> float:
    """Return the seconds of ``passes`` forward passes over ``tokens`` tokens at ``rate`` FLOP/s."""
    return passes * 2 * parameters * tokens / rate


def estimate_decomposition(sublayers: Sequence[Sublayer]) -> float:
    """Return the seconds of computing spectra and factors of all sublayers."""
    flops = sum(decomposition_cost(s.shape) for s in sublayers)
    return flops / product_rate(torch.device("cpu"), torch.float64, 512)


def decomposition_cost(shape: tuple[int, int]) -> int:
    """Return the operations for spectrum and factors of W, at the rate of products."""
    m, n = shape
    return 2 * _EIGH_FLOPS * min(shape) ** 3 + 4 * m * n * min(shape)
