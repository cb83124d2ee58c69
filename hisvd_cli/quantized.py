"""Linear layers whose matrices are integers: 8 bits a number, or 4.

A matrix ``[m, n]`` is stored as two tensors. With 8 bits: int8 codes ``[m, n]`` and a scale a row,
``[m, 1]``. With 4 bits: two codes a byte (uint8 ``[m, ⌈n/2⌉]``, the even column in the lower half,
each plus 8) and a scale for each group of ``group_size`` columns of a row, ``[m, ⌈n/group_size⌉]``,
the last group short where n is no multiple. A number is code × scale; there is no zero point.

Scales are float16, and stored as their 16 bits in int16: transformers 4.57 rounds whatever floats a
checkpoint holds to the model's dtype, and ``model.to(torch.bfloat16)`` does, which would leave a
scale 8 bits. Libraries' own tensor types do not serve here: torchao's do not store in safetensors
without torchao's flattening of them (0.18 with torch 2.13: "invalid python storage"), which
transformers undoes only for checkpoints whose one quantization method is torchao.

This file travels with every checkpoint (see ``transformers_plugin.remote_code_files``), so it
imports torch and nothing else.
"""

from __future__ import annotations

from math import ceil


def quantized_bytes(shape: tuple[int, int], bits: int, group: int) -> int:
    """Return the bytes that a matrix takes on disk, its scales included.

    Args:
        shape: ``(m, n)``.
        bits: 8 or 4.
        group: columns that share a scale, with 4 bits.
    """
    rows, columns = shape
    if bits == 8:
        return rows * columns + 2 * rows
    return rows * ceil(columns / 2) + 2 * rows * ceil(columns / group)
