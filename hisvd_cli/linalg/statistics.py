"""What calibration knows of one sublayer: all that a decomposer may look at beside the weight.

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
"""What a method asks of a calibration, each made by one flag of ``hisvd calibrate``."""

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
    """Means over whole sequences of D = ∂loss/∂W.

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
    """What is known of one sublayer; None where it was not taken.

    Attributes:
        moment: second moment of the input (G) or of the output (M).
        channels: means of the input's channels.
        gradient: second moment of the gradient at the output, over tokens.
        weight_gradients: means over sequences of the weight's gradient.
        halves: moment and gradient of every other sequence alone, and of the rest; None where
            there is but one sequence.
    """

    moment: Moment | None = None
    channels: Channels | None = None
    gradient: Gradient | None = None
    weight_gradients: WeightGradients | None = None
    halves: tuple[Statistics, Statistics] | None = None


def required(value: Value | None, method: str, need: Need) -> Value:
    """Return a statistic, or say how to take it.

    Raises:
        SourceError: it was not taken; names the command that takes it.
    """
    if value is None:
        raise missing(method, need)
    return value


def missing(method: str, need: Need) -> SourceError:
    """Return the error of a method whose statistics were not taken."""
    return SourceError(
        f"'{method}' needs {need.replace('-', ' ')}, which this calibration does not hold.",
        f"Run: {COMMANDS[need]}",
    )
