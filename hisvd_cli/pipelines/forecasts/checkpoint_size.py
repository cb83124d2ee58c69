"""Estimates the bytes of a compressed checkpoint."""

from __future__ import annotations

from hisvd_cli.allocation.anatomy import Anatomy
from hisvd_cli.allocation.plan import Plan
from hisvd_cli.compression.layout import lay_out
from hisvd_cli.modeling.layers.shapes import is_stack, numel
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.compressing.quantization import bytes_saved
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.planning.byte_budgets import bytes_ratio
from hisvd_cli.pipelines.planning.byte_budgets import scope as byte_scope


def checkpoint_bytes(
    resolved: Resolved, source: Source, anatomy: Anatomy, plan: Plan | None
) -> int:
    """Return about how many bytes the weights of a checkpoint take: by a plan, or else by the
    ratio of the settings."""
    if plan is not None and plan.bytes is not None:
        return plan.bytes.model - plan.bytes.full + plan.bytes.kept
    if plan is None and (share := bytes_ratio(resolved)) is not None:
        scope = byte_scope(share, resolved.settings, source, anatomy)
        return scope.model - scope.full + scope.budget(share)
    total = source.weights.total_bytes
    itemsize = total / anatomy.total_parameters
    inside = anatomy.inside
    single = sum(numel(s.shape) for s in anatomy.sublayers if not is_stack(s.shape))

    def saved(kept: int) -> int:
        """Return the bytes saved by quantizing: of kept numbers, as many as are not in stacks."""
        return bytes_saved(resolved, kept * single // inside, itemsize)

    if plan is not None:
        size = lay_out(source, plan.ranks, plan.storage).total_bytes
        return size - saved(inside - int((total - size) / itemsize))
    knobs = resolved.settings.plan
    model = anatomy.size(knobs.include, knobs.exclude)
    dropped = model.sublayers - model.budget(knobs.ratio[0], knobs.ratio_of)
    return int(total - dropped * itemsize) - saved(inside - dropped)
