"""Assembles a plan from an allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hisvd_cli.allocation.budget import cost, full_rank, is_dense
from hisvd_cli.allocation.byte_budget import Choice
from hisvd_cli.allocation.methods import Allocation
from hisvd_cli.allocation.plan import Plan
from hisvd_cli.allocation.plans.rows import BytePlan, ClusterPlan, SublayerPlan
from hisvd_cli.allocation.spectrum import Spectrum, mean_over_matrices, tail_share
from hisvd_cli.modeling.layers.lowrank import Storage
from hisvd_cli.modeling.layers.shapes import numel


@dataclass(frozen=True)
class ModelSize:
    """Parameters of the whole model, and of its compressible sublayers."""

    total: int
    sublayers: int

    def budget(self, ratio: float, ratio_of: str) -> int:
        """Return the parameter budget of the sublayers at a ratio of them, or of the model.

        It is negative if the rest of the model exceeds the ratio.
        """
        if ratio_of == "model":
            return int(ratio * self.total) - (self.total - self.sublayers)
        return int(ratio * self.sublayers)


def assemble(
    *,
    ratio: float,
    allocator: str,
    allocation: Allocation,
    spectra: Sequence[Spectrum],
    layers: Sequence[int],
    size: ModelSize,
    budget_parameters: int,
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> Plan:
    """Return the plan of an allocation."""
    rows = [
        _row(spectrum, layer, allocation, i, settings["storage"])
        for i, (spectrum, layer) in enumerate(zip(spectra, layers, strict=True))
    ]
    kept = sum(row.parameters for row in rows)
    return Plan(
        ratio=ratio,
        model_ratio=(size.total - size.sublayers + kept) / size.total,
        allocator=allocator,
        settings=dict(settings),
        budget_parameters=budget_parameters,
        kept_parameters=kept,
        predicted_loss=sum(row.loss for row in rows),
        clusters=_cluster_rows(rows, spectra, allocation),
        sublayers=rows,
        provenance=dict(provenance),
    )


def by_bytes(plan: Plan, chosen: Sequence[Choice], counted: BytePlan) -> Plan:
    """Return a plan with the bits of every sublayer and the byte counts."""
    rows = [
        replace(row, bits=choice.bits, bytes=choice.price, loss=choice.loss)
        for row, choice in zip(plan.sublayers, chosen, strict=True)
    ]
    return replace(plan, sublayers=rows, predicted_loss=sum(c.loss for c in chosen), bytes=counted)


def _row(
    spectrum: Spectrum, layer: int, allocation: Allocation, i: int, storage: Storage
) -> SublayerPlan:
    rank = allocation.ranks[i]
    dense = is_dense(rank, spectrum.shape, storage)
    return SublayerPlan(
        name=spectrum.name,
        layer=layer,
        cluster=spectrum.cluster,
        shape=spectrum.shape,
        density=allocation.densities[i] if allocation.densities else None,
        baseline_rank=allocation.baselines[i],
        rank=rank,
        full_rank=full_rank(spectrum.shape),
        dense=dense,
        parameters=int(cost(rank, spectrum.shape, storage)),
        loss=0.0 if dense else float(spectrum.energy[rank:].sum()),
    )


def _cluster_rows(
    rows: Sequence[SublayerPlan], spectra: Sequence[Spectrum], allocation: Allocation
) -> list[ClusterPlan]:
    table = []
    for cluster in dict.fromkeys(row.cluster for row in rows):
        mine = [(r, s) for r, s in zip(rows, spectra, strict=True) if r.cluster == cluster]
        densities = [(r.density, r.shape) for r, _ in mine if r.density is not None]
        tails = [
            (0.0 if row.dense else tail_share(s.energy, row.rank), row.shape) for row, s in mine
        ]
        full = sum(numel(row.shape) for row, _ in mine)
        table.append(
            ClusterPlan(
                cluster=cluster,
                sublayers=len(mine),
                density=mean_over_matrices(densities) if densities else None,
                tail_share=allocation.tail_shares.get(cluster, mean_over_matrices(tails)),
                factor=allocation.factors.get(cluster),
                kept_ratio=sum(row.parameters for row, _ in mine) / full,
            )
        )
    return table
