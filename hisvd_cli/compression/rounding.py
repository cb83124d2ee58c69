"""Rounding of matrices to integers: to nearest, or with error compensation (GPTQ).

Legend: W ``[m, n]`` a matrix applied to inputs x ``[n]``, H = E[x xᵀ] ``[n, n]``. Rounding W to Ŵ
causes the output error tr((W − Ŵ) H (W − Ŵ)ᵀ). A low-rank pair is U ``[m, r]`` and V ``[r, n]``;
the inputs of U have the moment V H Vᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor

from hisvd_cli.modeling.layers.quantized import SCALE, pack
from hisvd_cli.utils.errors import NumericalError

_RANGE = {4: (-8, 7), 8: (-127, 127)}
_BLOCK = 128
"""Columns whose errors are compensated together in later columns."""
_SHRINK = tuple(1 - 0.0125 * step for step in range(13))
"""Candidate scales, relative to the one without clipping. Lost output energy of a dense v_proj:
0.0039 with these, 0.0045 with steps of 0.05 down to 0.6, 0.0041 without a search."""


@dataclass(frozen=True)
class Rounded:
    """A matrix rounded to integers.

    Attributes:
        codes: ``[m, n]``, int8.
        scales: ``[m, groups]``, float16.
        group: columns that share a scale.
        bits: 8 or 4.
    """

    codes: Tensor
    scales: Tensor
    group: int
    bits: int

    def matrix(self) -> Tensor:
        """Return code × scale ``[m, n]`` in float32."""
        return self.codes * _spread(self.scales, self.codes.shape[1], self.group)

    def stored(self, leaf: str) -> dict[str, Tensor]:
        """Return the tensors of the matrix on disk, named after ``leaf``."""
        codes = pack(self.codes) if self.bits == 4 else self.codes
        return {leaf: codes, leaf + SCALE: self.scales.view(torch.int16)}


def _spread(scales: Tensor, columns: int, group: int) -> Tensor:
    """Return the scale of every number ``[m, columns]`` in float32."""
    return scales.float().repeat_interleave(group, 1)[:, :columns]


def round_nearest(matrix: Tensor, bits: int, group: int) -> Rounded:
    """Round every number to the nearest code.

    Args:
        matrix: ``[m, n]``.
        bits: 8 or 4.
        group: columns that share a scale; all columns at 8 bits.

    Raises:
        NumericalError: numbers are not finite, or too large for a scale in float16.
    """
    wide = matrix.float()
    group = wide.shape[1] if bits == 8 else group
    scales = _find_scales(wide, bits, group)
    codes = _codes(wide, _spread(scales, wide.shape[1], group), bits).to(torch.int8)
    return Rounded(codes, scales, group, bits)


def _codes(numbers: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return the nearest codes, as floating-point numbers."""
    # A zero scale means that all its numbers round to zero.
    divisors = torch.where(scales == 0, torch.inf, scales)
    return (numbers / divisors).round_().clamp_(*_RANGE[bits])


def _find_scales(matrix: Tensor, bits: int, group: int, importance: Tensor | None = None) -> Tensor:
    """Return the scales ``[m, groups]`` of a matrix ``[m, n]``, float16.

    At 4 bits, each group gets the candidate scale of least squared error; at 8 bits, each row gets
    the scale of its largest number.

    Args:
        matrix: float32.
        bits: 8 or 4.
        group: columns that share a scale.
        importance: weight of each column's squared error ``[n]``; default: equal weights.

    Raises:
        NumericalError: see :func:`round_nearest`.
    """
    columns = matrix.shape[1]
    padding = -columns % group
    parts = F.pad(matrix, (0, padding)).view(len(matrix), -1, group)
    low, high = _RANGE[bits]
    lower, upper = parts.amin(2), parts.amax(2)
    if bits == 8:
        return _half(torch.maximum(-lower, upper) / high)
    # The bound of larger magnitude gets the code −8; the scale is negative if it is the upper one.
    widest = torch.where(upper > -lower, upper, lower) / low
    weights = matrix.new_ones(columns) if importance is None else importance.to(matrix)
    weights = F.pad(weights, (0, padding)).view(-1, group)
    found, least = _half(widest), torch.full_like(widest, torch.inf)
    for share in _SHRINK:
        scale = _half(widest * share)
        wide = scale.float()[..., None]
        error = (_codes(parts, wide, bits) * wide - parts).square().mul(weights).sum(2)
        found = torch.where(error < least, scale, found)
        least = torch.minimum(error, least)
    return found


def _half(scales: Tensor) -> Tensor:
    narrow = scales.half()
    if not bool(narrow.isfinite().all()):
        raise NumericalError(
            "A matrix contains numbers that are not finite, or too large for a scale in float16.",
            "Check the checkpoint with 'hisvd inspect'.",
        )
    return narrow


@dataclass(frozen=True)
class Metric:
    """A moment, prepared for error compensation.

    Attributes:
        moment: H ``[n, n]``.
        order: the columns, in descending order of the diagonal of H.
        factor: upper triangular R ``[n, n]``, float32; RᵀR is the inverse of H in that order.
    """

    moment: Tensor
    order: Tensor
    factor: Tensor


def metric_of(moment: Tensor, damping: float) -> Metric:
    """Return the metric of H ``[n, n]``, which may be singular.

    Args:
        moment: H.
        damping: damping of its diagonal, relative to its mean; multiplied by 10 until H is positive
            definite.

    Raises:
        NumericalError: H is not finite.
    """
    if not bool(moment.isfinite().all()):
        raise NumericalError(
            "The second moment of an input is NaN or infinite.",
            "Use `model.dtype` float32, and check the checkpoint with 'hisvd inspect'.",
        )
    order = moment.diagonal().argsort(descending=True, stable=True)
    wide = moment[order][:, order].double()
    added = damping * float(wide.diagonal().mean()) or 1.0
    while True:
        wide.diagonal().add_(added)
        lower, failed = torch.linalg.cholesky_ex(wide)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed):
            return Metric(moment, order, upper.float())
        added *= 10


def round_compensated(matrix: Tensor, metric: Metric, bits: int, group: int) -> Rounded:
    """Round column by column, and compensate each error in later columns.

    GPTQ (Frantar et al. 2023, arXiv 2210.17323, algorithm 1), with columns in descending order of
    the diagonal of H. Groups are adjacent columns of W; their scales are selected before rounding.

    Args:
        matrix: W ``[m, n]``.
        metric: the metric of H ``[n, n]``.
        bits: 8 or 4.
        group: columns that share a scale; all columns at 8 bits.

    Raises:
        NumericalError: see :func:`round_nearest`.
    """
    rows, columns = matrix.shape
    group = columns if bits == 8 else group
    order, factor = metric.order, metric.factor
    scales = _find_scales(matrix.float(), bits, group, metric.moment.diagonal())
    spread = _spread(scales, columns, group).T[order]  # [n, m], as all below
    left, codes = matrix.float().T[order], torch.empty_like(spread)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = left.new_empty(end - start, rows)
        for i in range(start, end):
            codes[i] = _codes(left[i], spread[i], bits)
            errors[i - start] = (left[i] - codes[i] * spread[i]) / factor[i, i]
            left[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i - start], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return Rounded(codes[order.argsort()].T.to(torch.int8).contiguous(), scales, group, bits)
