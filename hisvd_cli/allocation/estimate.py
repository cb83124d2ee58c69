"""Estimates of disk space, memory and time, from shapes and one short measurement.

Legend: m outputs and n inputs of a sublayer. A token passes k of the E experts of a stack.
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
    squares,
    with_sides,
)
from hisvd_cli.modeling.layers.shapes import Shape, copies, copies_used, matrix_of, numel
from hisvd_cli.modeling.structure.sublayers import Sublayer

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


def _passed(work: Workload) -> list[tuple[int, int]]:
    """Return ``(m, n)`` of every matrix that one token passes."""
    return [
        matrix_of(s.shape)
        for s in work.sublayers
        for _ in range(copies_used(s.shape, work.experts_per_token))
    ]


def estimate_calibration(work: Workload) -> Estimate:
    """Return an upper estimate of a calibration, see :mod:`hisvd_cli.calibration.workload`."""
    passed = _passed(work)
    products = sum(min(shape) ** 2 for shape in passed)
    seconds = _seconds(work, sum(m * n for m, n in passed), products)
    return Estimate(4 * squares(work.sublayers), calibration_peak(work), seconds)


def estimate_gradients(work: Workload, weights: bool) -> Estimate:
    """Return an estimate of collecting gradients after a calibration.

    Args:
        work: the workload; all parameters outside sublayers are counted as the head.
        weights: whether weight gradients are collected too.
    """
    shapes = _passed(work)
    weight = sum(m * n for m, n in shapes)
    # Forward and backward through every block and the head; gradients of tall weights are also
    # propagated to the input.
    passed = 2 * weight + 3 * work.outside_parameters
    passed += sum(m * n for m, n in shapes if m > n)
    # H, and again H and G for half of the text
    products = 2 * sum(min(shape) ** 2 for shape in shapes)
    whole = 0
    if weights:
        whole = sum(copies(s.shape) * with_sides(s) for s in work.sublayers)
        both = sum(numel(s.shape) * sum(matrix_of(s.shape)) for s in work.sublayers)
        products += weight + both // work.seqlen
    seconds = _seconds(work, passed, products)
    stored = 4 * (3 * squares(work.sublayers) + whole)
    return Estimate(stored, gradients_peak(work, weights), seconds)


def estimate_update(work: Workload) -> float:
    """Return the seconds of the forward passes of an update through both models, without factoring.

    A block runs to each of about four distinct inputs of its sublayers, half of it on average, and
    once to its end; C and G′ are counted for every sublayer.
    """
    passed = _passed(work)
    products = sum(2 * n**2 for _, n in passed)
    return _seconds(work, 2 * 3 * sum(m * n for m, n in passed), products)


def estimate_measuring(parameters: int, tokens: int, passes: float, rate: float) -> float:
    """Return the seconds of ``passes`` forward passes over ``tokens`` tokens at ``rate`` FLOP/s."""
    return passes * 2 * parameters * tokens / rate


def estimate_decomposition(sublayers: Sequence[Sublayer]) -> float:
    """Return the seconds of computing spectra and factors of all sublayers."""
    flops = sum(decomposition_cost(s.shape) for s in sublayers)
    return flops / product_rate(torch.device("cpu"), torch.float64, 512)


def decomposition_cost(shape: Shape) -> int:
    """Return the operations for spectrum and factors of W, of every expert for a stack, at the rate
    of products."""
    m, n = matrix_of(shape)
    return copies(shape) * (2 * _EIGH_FLOPS * min(m, n) ** 3 + 4 * m * n * min(m, n))
