"""Checks that the rows of a plan fit the model that it is to compress."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hisvd_cli.allocation.anatomy import Anatomy, dissect
from hisvd_cli.allocation.budget import full_rank
from hisvd_cli.allocation.byte_budget import stored_bytes
from hisvd_cli.allocation.plan import Plan
from hisvd_cli.allocation.plans.rows import BytePlan
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.planning.byte_budgets import weight_width
from hisvd_cli.utils.errors import SourceError, suggest

_SHOWN = 3
_FEW = 12
"""Most names of layers that a message lists."""


def check_fit(plan: Plan, path: Path, source: Source) -> None:
    """Check before any work that every row of a plan is a layer of the model, with its shape.

    Args:
        plan: the plan.
        path: its file, for errors.
        source: the model.

    Raises:
        SourceError: a row does not fit; names the row, the value and that of the model.
        UnsupportedModelError: the model cannot be factored.
    """
    anatomy = dissect(source)
    found = [*_row_problems(plan, anatomy)]
    if not found and plan.bytes is not None:
        found = [*_byte_problems(plan, plan.bytes, source, anatomy)]
    if found:
        more = len(found) - _SHOWN
        shown = found[:_SHOWN] + [f"{more} more rows do not fit."] * (more > 0)
        raise SourceError(
            f"{path} does not fit {source.name}: {' '.join(shown)}",
            "Correct the plan, or make it again with: hisvd plan --output plan.json",
        )


def _row_problems(plan: Plan, anatomy: Anatomy) -> Iterator[str]:
    known = {s.name: s for s in anatomy.sublayers}
    for row in plan.sublayers:
        layer = known.get(row.name)
        if layer is None:
            near = suggest(row.name, known)
            hint = f" {near}" if near.startswith("Did") or len(known) <= _FEW else ""
            yield f"it has no layer '{row.name}'.{hint}"
            continue
        for key in ("layer", "cluster", "shape"):
            given, right = getattr(row, key), getattr(layer, key)
            if given != right:
                yield f"{row.name} has {key} {_json(given)}, not {_json(right)}."


def _byte_problems(
    plan: Plan, counted: BytePlan, source: Source, anatomy: Anatomy
) -> Iterator[str]:
    known = {s.name: s for s in anatomy.sublayers}
    for row in plan.sublayers:
        rank = full_rank(row.shape) if row.dense else row.rank
        width = weight_width(source, anatomy, known[row.name])
        size = stored_bytes(row.shape, rank, row.bits, counted.group_size, width)
        if row.bytes != size:
            yield f"{row.name} has bytes {row.bytes}, but rank {rank} takes {size}."


def _json(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
