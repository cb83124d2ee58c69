"""Decomposers: functions from a weight, statistics and a rank to factors U and V, one file each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hisvd_cli.utils.registry import MANY, Needs, Options, Registry

if TYPE_CHECKING:
    from pydantic import BaseModel
    from torch import Tensor

    from hisvd_cli.linalg.eigen import Solver
    from hisvd_cli.linalg.metric import Metric
    from hisvd_cli.linalg.statistics import Statistics

Decomposer = Callable[..., "tuple[Tensor, Tensor]"]
"""``(W [m, n], statistics: Statistics, rank: int, *, …) -> (U [m, r], V [r, n])``, both in float64,
best component first. A decomposer may name the keyword-only parameters ``options`` (its options),
``seed`` (of the calibration), and the settings of ``[plan]`` and ``[compress]``."""

DECOMPOSERS: Registry[Decomposer] = Registry(
    "decomposer",
    __name__,
    "hisvd.decomposers",
    ("svd", "asvd", "whitened", "fwsvd", "gfwsvd", "fisher", "randomized"),
)

MetricOf = Callable[..., "Metric"]
"""``(statistics: Statistics, *, …) -> Metric``, with the keyword-only parameters of a
:data:`Decomposer`, and ``weight``."""

__all__ = ["DECOMPOSERS", "MANY", "Decomposer", "Options", "register_metric"]


def register_metric(
    name: str, *, needs: Needs = (), options: type[BaseModel] = Options
) -> Callable[[MetricOf], MetricOf]:
    """Return a decorator that registers a decomposer by its metric: the factors are the optimal
    ones in the metric that the decorated function returns.

    Args:
        name: the name of the method.
        needs: the statistics that it needs, see :data:`hisvd_cli.linalg.statistics.Need`.
        options: its options.
    """

    def add(metric: MetricOf) -> MetricOf:
        DECOMPOSERS.register(name, needs=needs, options=options)(_truncating(metric))
        return metric

    return add


def _truncating(metric: MetricOf) -> Decomposer:
    """Return the decomposer of a metric."""
    named = inspect.signature(metric).parameters
    own = [p for p in named.values() if p.kind is p.KEYWORD_ONLY and p.name != "weight"]

    def decompose(
        weight: Tensor, statistics: Statistics, rank: int, *, solver: Solver = "auto", **given: Any
    ) -> tuple[Tensor, Tensor]:
        from hisvd_cli.linalg.truncation import truncate

        if "weight" in named:
            given["weight"] = weight
        return truncate(weight, metric(statistics, **given), rank, solver)

    weight, statistics, rank, solver, _ = inspect.signature(decompose).parameters.values()
    parameters = [weight, statistics, rank, *own, solver]
    decompose.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return decompose
