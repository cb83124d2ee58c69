"""Dequantizes weights, a slice of rows at a time.

Formats: float8 with scales (DeepSeek-V3, Qwen, ModelOpt, FBGEMM), compressed-tensors (float8, int8,
packed integers), and MXFP4 (the OCP microscaling format, as stored by gpt-oss). A value is
``(stored − zero point) · scale``, computed in float32 and rounded once.

Legend: weights ``[m, n]``; a grid of scales ``[a, b]``, one per rectangle of the weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SLICE_VALUES = 1 << 22
"""Values converted at a time; limits the size of the float32 copy."""

_MX_GROUP = 32
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of 4-bit floating-point numbers; the highest bit is the sign."""


def scale_values(scale: Tensor) -> Tensor:
    """Return scales in float32; uint8 scales are exponents of two with bias 127 (E8M0)."""
    if scale.dtype == torch.uint8:
        return torch.ldexp(torch.ones(scale.shape), scale.to(torch.int32) - 127)
    return scale.to(torch.float32)


def scaled(
    stored: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    zero_point: Tensor | None = None,
    block: tuple[int, int] | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Return ``(stored − zero_point) · scale``.

    Args:
        stored: ``[m, n]``, float8 or integers.
        scale: a single scale, one per row ``[m]`` or ``[m, 1]``, or a grid ``[a, b]``.
        dtype: dtype of the result.
        zero_point: of the same shape as the scale.
        block: rows and columns of a rectangle of the grid, if the config specifies them.
        groups: index of the grid column for each weight column ``[n]``.

    Raises:
        ValueError: the scales do not match the weight.
    """
    grid = _grid(scale_values(scale), stored)
    zeros = None if zero_point is None else _grid(zero_point.to(torch.float32), stored)
    height, columns = _rectangles(stored, grid, block)
    columns = columns if groups is None else groups.to(torch.long)
    if int(columns.max()) >= grid.shape[1] or int(columns.min()) < 0:
        raise ValueError(f"a column refers to a group of scales beyond the {grid.shape[1]} stored")

    def convert(first: int, part: Tensor) -> Tensor:
        rows = torch.arange(first, first + len(part)) // height
        values = part.to(torch.float32)
        if zeros is not None:
            values -= _spread(zeros, rows, columns)
        return values.mul_(_spread(grid, rows, columns))

    return _by_rows(stored, stored.shape[1], dtype, convert)


def _grid(scale: Tensor, stored: Tensor) -> Tensor:
    """Return scales as a grid ``[a, b]``."""
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.ndim == 1 and len(scale) == len(stored):
        return scale[:, None]
    if scale.ndim != 2:
        raise ValueError(f"scales {list(scale.shape)} do not match {list(stored.shape)}")
    return scale


def _rectangles(stored: Tensor, grid: Tensor, block: tuple[int, int] | None) -> tuple[int, Tensor]:
    """Return the rows per rectangle, and the grid column of each weight column ``[n]``."""
    sides = []
    for axis, (size, count) in enumerate(zip(stored.shape, grid.shape, strict=True)):
        named = block[axis] if block else 0
        if count == 1:
            sides.append(size)
        elif named and -(-size // named) == count:  # the last rectangle may be smaller
            sides.append(named)
        elif count and size % count == 0:
            sides.append(size // count)
        else:
            raise ValueError(f"scales {list(grid.shape)} do not match {list(stored.shape)}")
    return sides[0], torch.arange(stored.shape[1]) // sides[1]


def _spread(grid: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    rows = rows if len(grid) > 1 else torch.zeros(1, dtype=torch.long)
    wide = grid.index_select(0, rows)
    return wide if grid.shape[1] == 1 else wide.index_select(1, columns)


def _by_rows(
    stored: Tensor, width: int, dtype: torch.dtype, convert: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Return the result ``[m, width]``, converted a slice of rows at a time."""
    made = torch.empty(len(stored), width, dtype=dtype)
    step = max(1, SLICE_VALUES // max(1, width))
    for first in range(0, len(stored), step):
        part = stored[first : first + step]
        made[first : first + len(part)] = convert(first, part)
    return made


def unpacked(packed: Tensor, bits: int, width: int) -> Tensor:
    """Return the signed integers ``[m, width]`` packed in int32 words ``[m, w]``.

    A word contains ``32 // bits`` values, the first in the lowest bits, each offset by half its
    range.

    Raises:
        ValueError: there are too few words for the width.
    """
    per_word = 32 // bits
    if packed.ndim != 2 or packed.shape[1] * per_word < width:
        raise ValueError(f"words {list(packed.shape)} contain fewer than {width} {bits}-bit values")
    shifts = torch.arange(per_word, dtype=torch.int32) * bits
    mask, half = (1 << bits) - 1, 1 << (bits - 1)
    made = torch.empty(len(packed), width, dtype=torch.int8)
    step = max(1, SLICE_VALUES // max(1, width))
    for first in range(0, len(packed), step):
        words = packed[first : first + step, :, None]
        values = ((words >> shifts) & mask).flatten(1)[:, :width]
        made[first : first + step] = (values - half).to(torch.int8)
    return made


def microscaled(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize MXFP4 experts.

    Args:
        blocks: ``[E, out, groups, 16]``, two 4-bit numbers per byte, the lower half first.
        scales: exponents ``[E, out, groups]``.
        dtype: dtype of the result.

    Returns:
        The experts ``[E, in, out]``.

    Raises:
        ValueError: blocks and scales do not match.
    """
    if blocks.ndim != 4 or blocks.shape[:3] != scales.shape or blocks.shape[3] != _MX_GROUP // 2:
        raise ValueError(f"scales {list(scales.shape)} do not match blocks {list(blocks.shape)}")
    experts, out, groups, half = blocks.shape
    known = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    exponents = scale_values(scales).flatten(0, 1)

    def convert(first: int, part: Tensor) -> Tensor:
        halves = torch.stack([part & 0xF, part >> 4], -1).to(torch.long)
        values = known[halves].view(len(part), groups, _MX_GROUP)
        return values.mul_(exponents[first : first + len(part), :, None]).flatten(1)

    flat = _by_rows(blocks.view(experts * out, groups, half), groups * _MX_GROUP, dtype, convert)
    return flat.view(experts, out, -1).transpose(1, 2).contiguous()
