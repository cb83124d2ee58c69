"""Calibration statistics of one sublayer, the input of decomposers besides the weight.

Legend: W ``[m, n]``, input x ``[n]``, output y = W x ``[m]``; g = ∂loss/∂y ``[m]`` at one token,
the loss summed over tokens; D = ∂loss/∂W = Σ_t g xᵀ ``[m, n]`` of one whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from hisvd_cli.utils.errors import SourceError

if TYPE_CHECKING:
    from torch import Tensor

    from hisvd_cli.linalg.moments import Moment

Need = Literal["moments", "gradients", "weight-gradients"]
"""Statistics that a method may require."""

COMMANDS: dict[Need, str] = {
    "moments": "hisvd calibrate",
    "gradients": "hisvd calibrate --gradients",
    "weight-gradients": "hisvd calibrate --weight-gradients",
}
Value = TypeVar("Value")


@dataclass(frozen=True)
class Channels:
    """Means over tokens of each input channel: E|x_j| and E x_j² (the diagonal of G), ``[n]``."""

    mean_abs: Tensor
    mean_square: Tensor


@dataclass(frozen=True)
class Gradient:
    """The second moment of g over tokens, on the smaller side of the weight.

    Attributes:
        moment: H = E[g gᵀ] ``[m, m]`` (side ``output``), or Wᵀ H W ``[n, n]`` (side ``input``).
        mean_square: the mean of the diagonal of H.
    """

    moment: Moment
    mean_square: float


@dataclass(frozen=True)
class WeightGradients:
    """Means over sequences of D = ∂loss/∂W.

    Attributes:
        mean: E[D] ``[m, n]``.
        output: E[D Dᵀ] ``[m, m]``; its diagonal is the row-wise Fisher information.
        input: E[Dᵀ D] ``[n, n]``.
    """

    mean: Tensor
    output: Tensor
    input: Tensor


@dataclass(frozen=True)
class Statistics:
    """The statistics of one sublayer; None for those that were not collected.

    Attributes:
        moment: second moment of the input (G) or of the output (M).
        channels: means of the input channels.
        gradient: second moment of the gradient at the output, over tokens.
        weight_gradients: means of the weight gradient, over sequences.
        halves: moment and gradient of the even and of the odd sequences; None if there is only one
            sequence.
    """

    moment: Moment | None = None
    channels: Channels | None = None
    gradient: Gradient | None = None
    weight_gradients: WeightGradients | None = None
    halves: tuple[Statistics, Statistics] | None = None


def required(value: Value | None, method: str, need: Need) -> Value:
    """Return a statistic that must be present.

    Raises:
        SourceError: it was not collected; the hint names the command that collects it.
    """
    if value is None:
        raise missing(method, need)
    return value


def missing(method: str, need: Need) -> SourceError:
    """Return the error for a method whose statistics were not collected."""
    return SourceError(
        f"'{method}' needs {need.replace('-', ' ')}, which this calibration does not contain.",
        f"Run: {COMMANDS[need]}",
    )
