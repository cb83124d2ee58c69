"""Checks that the values of a plan agree, as people edit plans by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isclose, prod

from hisvd_cli.allocation.budget import cost, full_rank, is_dense
from hisvd_cli.allocation.plans.rows import ClusterPlan, SublayerPlan
from hisvd_cli.modeling.layers.lowrank import Storage

_SHOWN = 6
_TOLERANCE = 1e-6
"""Of ratios, which are shown with six digits."""


class InconsistentPlanError(ValueError):
    """Values of a plan disagree; the message names each, and what it must be."""


def check_consistency(
    rows: Sequence[SublayerPlan],
    clusters: Sequence[ClusterPlan],
    storage: Storage,
    *,
    kept_parameters: int,
    model_ratio: float,
    model_parameters: int | None,
    kept_bytes: int | None,
) -> None:
    """Check that names are unique, and that all values that follow from ranks and shapes do.

    Totals are compared with the ranks, not with ``parameters`` of the rows, so that one message
    says everything that a changed rank requires.

    Args:
        rows: the planned sublayers.
        clusters: their types.
        storage: storage of the pairs.
        kept_parameters: parameters of the sublayers after compression.
        model_ratio: kept share of the parameters of the whole model.
        model_parameters: parameters of the whole model; None if unknown.
        kept_bytes: bytes of the sublayers after compression, for a plan by bytes.

    Raises:
        InconsistentPlanError: names the values that disagree, and what they must be.
    """
    kept = sum(_cost(row, storage) for row in rows)
    found = [
        *_repeated(rows),
        *_row_values(rows, storage),
        *_cluster_values(rows, clusters, storage),
    ]
    if kept_parameters != kept:
        found.append(f"kept_parameters is {kept_parameters}, but the ranks require {kept}")
    if model_parameters is not None:
        ratio = 1 - (_full(rows) - kept) / model_parameters
        if not _same(model_ratio, ratio):
            found.append(f"model_ratio is {model_ratio:.6f}, but the ranks require {ratio:.6f}")
    stored = sum(row.bytes or 0 for row in rows)
    if kept_bytes is not None and kept_bytes != stored:
        found.append(f"bytes.kept is {kept_bytes}, but the bytes of the layers sum to {stored}")
    if found:
        more = len(found) - _SHOWN
        shown = found[:_SHOWN] + [f"{more} more values disagree"] * (more > 0)
        raise InconsistentPlanError("; ".join(shown) + ".")


def _repeated(rows: Sequence[SublayerPlan]) -> Iterator[str]:
    seen: set[str] = set()
    for row in rows:
        if row.name in seen:
            yield f"{row.name} is listed twice"
        seen.add(row.name)


def _row_values(rows: Sequence[SublayerPlan], storage: Storage) -> Iterator[str]:
    for row in rows:
        shape, dense = list(row.shape), is_dense(row.rank, row.shape, storage)
        of = f"rank {row.rank} of shape {shape} in {storage} storage"
        if row.full_rank != full_rank(row.shape):
            least = full_rank(row.shape)
            yield f"{row.name} has full_rank {row.full_rank}, but shape {shape} requires {least}"
        if row.dense != dense:
            yield f"{row.name} has dense {_json(row.dense)}, but {of} requires {_json(dense)}"
        if row.parameters != (size := _cost(row, storage)):
            yield f"{row.name} has parameters {row.parameters}, but {of} requires {size}"


def _cluster_values(
    rows: Sequence[SublayerPlan], clusters: Sequence[ClusterPlan], storage: Storage
) -> Iterator[str]:
    types: dict[str, list[SublayerPlan]] = {}
    for row in rows:
        types.setdefault(row.cluster, []).append(row)
    named = [each.cluster for each in clusters]
    if sorted(named) != sorted(types):
        yield f"clusters lists {', '.join(named)}, but the layers are of {', '.join(types)}"
        return
    for each in clusters:
        mine, name = types[each.cluster], f"the cluster {each.cluster}"
        if each.sublayers != len(mine):
            yield f"{name} has sublayers {each.sublayers}, but {len(mine)} are listed"
        kept = sum(_cost(row, storage) for row in mine) / _full(mine)
        if not _same(each.kept_ratio, kept):
            yield f"{name} has kept_ratio {each.kept_ratio:.6f}, but the ranks require {kept:.6f}"


def _cost(row: SublayerPlan, storage: Storage) -> int:
    return int(cost(row.rank, row.shape, storage))


def _full(rows: Sequence[SublayerPlan]) -> int:
    return sum(prod(row.shape) for row in rows)


def _same(one: float, other: float) -> bool:
    return isclose(one, other, rel_tol=0, abs_tol=_TOLERANCE)


def _json(value: bool) -> str:
    return "true" if value else "false"
