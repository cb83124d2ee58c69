"""Activation-whitened truncation, without an inverse of anything.

The best rank-k W′ under ``‖(W − W′)G^½‖_F`` (SVD-LLM's objective) is ``U_k U_kᵀ W`` with U_k the
top eigenvectors of ``M = W G Wᵀ``. A singular G needs no special case.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hisvd_cli.decompose import DECOMPOSERS
from hisvd_cli.errors import HisvdError
from hisvd_cli.moments import Moment


@DECOMPOSERS.register("whitened")
def whitened(weight: Tensor, moment: Moment | None, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors ``U = U_k`` and ``V = U_kᵀ W``.

    Args:
        weight: W ``[m, n]``.
        moment: second moment of the input or of the output.
        rank: k, at least 1 and at most ``min(m, n)``.

    Returns:
        U ``[m, k]`` with orthonormal columns, V ``[k, n]``, both in float64.

    Raises:
        HisvdError: without a moment.
    """
    if moment is None:
        raise HisvdError(
            "The decomposer 'whitened' needs calibration statistics.", "Run: hisvd calibrate"
        )
    wide = weight.double()
    m, n = wide.shape
    if m <= n or moment.side == "output":
        basis = _top_eigenvectors(moment.of_output(wide), rank)
    else:
        basis = _basis_from_input_side(wide @ moment.root, rank)
    return basis, basis.T @ wide


def _top_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    _, vectors = torch.linalg.eigh(gram)
    top: Tensor = vectors.flip(1)[:, :rank].contiguous()
    return top


def _basis_from_input_side(half: Tensor, rank: int) -> Tensor:
    """Return the top left singular vectors ``[m, rank]`` of ``half = W G^½`` with m > n.

    Where half has a lower rank than asked for, dividing by its singular values would blow up
    noise, so the columns are made orthonormal by QR: those beyond its rank are then arbitrary, and
    so they may be, because they carry no energy.
    """
    right = _top_eigenvectors(half.T @ half, rank)  # [n, rank]
    left: Tensor = torch.linalg.qr(half @ right).Q
    return left
