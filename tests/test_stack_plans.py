"""Stacks of experts: E matrices with one rank, beside layers of a single matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from hisvd_cli.allocation.anatomy import Anatomy
from hisvd_cli.allocation.budget import Budget, full_rank
from hisvd_cli.allocation.byte_budget import BITS, Candidate, choices, spend, stored_bytes
from hisvd_cli.allocation.byte_frontier import JOINT, frontier
from hisvd_cli.allocation.estimate import decomposition_cost, estimate_calibration
from hisvd_cli.allocation.methods import Allocation
from hisvd_cli.allocation.plan import Plan, load_plan
from hisvd_cli.allocation.plan_assembly import ModelSize, assemble
from hisvd_cli.allocation.rounding_noise import Rounding
from hisvd_cli.allocation.spectrum import Spectrum
from hisvd_cli.calibration.workload import (
    Workload,
    activations,
    calibration_peak,
    factoring_peak,
    gradients_peak,
    quantization_peak,
)
from hisvd_cli.cli.views.plans import plan_view
from hisvd_cli.cli.views.results import audit_view
from hisvd_cli.compression.quantized_parts import factored_stacks
from hisvd_cli.evaluation.grid import Evaluation, Grid
from hisvd_cli.evaluation.perplexity import PerplexityResult
from hisvd_cli.evaluation.report import page
from hisvd_cli.evaluation.report.content import ModelFacts, Report
from hisvd_cli.export.model_card import rewrite_card
from hisvd_cli.inspection.inspection import audit
from hisvd_cli.inspection.stored_sublayers import Layout, active_on_disk, rows_of, sublayer_shapes
from hisvd_cli.modeling.checkpoints.checkpoint import Checkpoint
from hisvd_cli.modeling.layers.shapes import Shape, matrix_of
from hisvd_cli.modeling.sources.model_config import experts_per_token
from hisvd_cli.modeling.structure.sublayers import Sublayer
from hisvd_cli.pipelines.api.plan_result import Plan as NotebookPlan
from hisvd_cli.utils.errors import SourceError
from hisvd_cli.utils.progress import Silent
from tests import schemas
from tests.allocation import allocate
from tests.test_json import holds
from tests.test_views import shown

EXPERTS = 4
UP: Shape = (EXPERTS, 20, 12)
KINDS: list[tuple[str, Shape]] = [("q_proj", (12, 12)), ("experts.gate_up_proj", UP)]
VERSIONS = {"hisvd": "0", "torch": "0", "transformers": "0"}
ACTIVE, PER_TOKEN, TOTAL = 5_328, 2, 6_768


def falling(seed: int, count: int, scale: float = 100.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    speed, noise = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    rest = torch.rand(count, generator=generator, dtype=torch.float64)
    decay = torch.exp(-(0.2 + 0.2 * speed) * torch.arange(count))
    energy = scale * (0.2 + noise) * decay * (0.5 + rest)
    found: torch.Tensor = energy.sort(descending=True).values
    return found


def spectra_of(shapes: Sequence[tuple[str, Shape]], layers: int = 3) -> list[Spectrum]:
    """Return one spectrum per kind and layer; that of a stack is E times that of an expert."""
    found = []
    for layer in range(layers):
        for number, (cluster, shape) in enumerate(shapes):
            count = shape[0] if len(shape) == 3 else 1
            energy = count * falling(7 * layer + number, full_rank(shape))
            changes = energy * (-1) ** torch.arange(len(energy))
            name = f"model.layers.{layer}.{cluster}"
            found.append(Spectrum(name, cluster, shape, energy, energy, layer, layer / 5, changes))
    return found


def apart(spectra: Sequence[Spectrum]) -> list[Spectrum]:
    """Return the spectra of the single experts, all of the same energies."""
    return [
        replace(
            s,
            name=f"{s.name}.{i}",
            shape=matrix_of(s.shape),
            energy=s.energy / s.shape[0],
            weight_energy=s.of_weight / s.shape[0],
            changes=None if s.changes is None else s.changes / s.shape[0],
        )
        for s in spectra
        for i in range(s.shape[0])
    ]


@dataclass
class Measured:
    """A probe whose divergence is the energy that a truncation drops."""

    spectra: Sequence[Spectrum]

    def divergence(self, name: str, rank: int) -> float:
        return float(next(s.energy for s in self.spectra if s.name == name)[rank:].sum())


OPTIONS = {
    "rank_method": "effective",
    "alpha": 0.5,
    "spectrum": "weight",
    "modulation": "logarithmic",
    "lwe_strength": 2.0,
    "tail_redundancy_weight": 30.0,
    "tokens": 512,
    "importance_weight": 0.6,
    "probe_ratio": 0.5,
    "depth_factor": 5.0,
}


@pytest.mark.parametrize("ratio", [0.3, 0.45])
@pytest.mark.parametrize(
    ("allocator", "values"),
    [
        ("uniform", {}),
        ("hisvd", {}),
        ("hisvd", {"rank_method": "mathematical", "spectrum": "whitened"}),
        ("waterfill", {}),
        ("svdllm-v2", {}),
        ("swift", {}),
        ("lems", {}),
        ("zero-sum", {"selection": "sigma"}),
        ("zero-sum", {"selection": "smallest"}),
    ],
)
def test_an_allocation_over_stacks_is_that_over_their_experts(
    allocator: str, values: dict[str, Any], ratio: float
) -> None:
    """The budget is what whole steps of stacks cost, so that single experts can end no step more.

    Both kinds of stacks have equal sides, so that all steps of a rank cost the same, and energies
    that fall fast, so that no stack is worth leaving dense.
    """
    kinds: list[tuple[str, Shape]] = [("up_proj", (EXPERTS, 60, 40)), ("gate", (EXPERTS, 40, 60))]
    stacks = spectra_of(kinds, layers=4)
    singles = apart(stacks)
    step = EXPERTS * (60 + 40)
    parameters = int(ratio * len(stacks) * EXPERTS * 60 * 40) // step * step

    def ranks(spectra: Sequence[Spectrum]) -> list[int]:
        budget = Budget([s.shape for s in spectra], parameters, [1] * len(spectra))
        given = {**OPTIONS, **values, "probe": Measured(spectra)}
        found = allocate(allocator, spectra, budget, **given).ranks
        assert budget.spent(found) == parameters
        return found

    together = ranks(stacks)
    assert ranks(singles) == [rank for rank in together for _ in range(EXPERTS)]
    assert len(set(together)) > 1 or allocator == "uniform"


@pytest.mark.parametrize("storage", ["pair", "pivoted"])
def test_dense_is_for_all_experts_or_none(storage: Any) -> None:
    """A stack breaks even where one of its experts does as a plain pair: at 240/32 = 7.5."""
    budget = Budget([UP], EXPERTS * 240, [1], storage=storage)
    assert [budget.spent([rank]) for rank in (7, 8)] == [EXPERTS * 7 * 32, EXPERTS * 240]
    assert budget.rounded([7.5], [falling(0, 12)]) == [12]


# Bytes


def candidate(shape: Shape, seed: int) -> Candidate:
    energy = falling(seed, full_rank(shape))
    stack = len(shape) == 3
    total = float(energy.sum())
    roundings = {} if stack else {8: Rounding(1e-4, 1e-4 * total), 4: Rounding(0.01, 0.01 * total)}
    return Candidate(shape, energy, energy, roundings)


def test_the_bytes_of_a_stack_are_those_of_its_experts_in_16_bits() -> None:
    for bits in BITS:
        assert stored_bytes(UP, 5, bits, 4, 2) == EXPERTS * 2 * 5 * (20 + 12)
        assert stored_bytes(UP, 12, bits, 4, 2) == EXPERTS * 2 * 20 * 12
    stack = candidate(UP, 1)
    found = choices(stack, BITS, 4, 1)
    assert {choice.bits for choice in found} == {16}
    losses = {c.rank: float(stack.energy[c.rank :].sum()) for c in found}
    assert {c.rank: c.loss for c in found} == pytest.approx(losses)
    assert [c.rank for c in found] == [1, 2, 3, 4, 5, 6, 7, 12]


def test_stacks_keep_their_dtype_in_every_layout() -> None:
    found = [candidate((12, 12), 0), candidate(UP, 1), candidate((20, 12), 2)]
    full = sum(c.full_bytes for c in found)
    made = spend([choices(c, BITS, 4, 1) for c in found], int(0.25 * full))
    assert made[1].bits == 16
    assert min(made[0].bits, made[2].bits) < 16
    points = {p.method: p for p in frontier(found, {0.6: int(0.6 * full)}, 4, 1)}
    assert len(points) == 8
    stack = EXPERTS * 2 * 240
    int8 = 12 * 12 + 2 * 12 + 20 * 12 + 2 * 20 + stack
    assert points["int8 dense"].bytes_ratio == pytest.approx(int8 / full)
    assert points[JOINT].predicted_loss <= points["16 bit ranks"].predicted_loss
    alone = [p for p in frontier(found[1:2], {0.6: int(0.6 * stack)}, 4, 1) if p.budget]
    assert len(alone) == 6
    assert len({(p.bytes_ratio, p.predicted_loss) for p in alone}) == 1


# Plans


def planned(storage: str = "pair", known: bool = True) -> Plan:
    """Return a plan of two layers, in which q_proj has rank 4 and the experts rank 3, except those
    of the last layer, which are dense."""
    spectra = spectra_of(KINDS, layers=3)
    ranks = [4, 3, 4, 3, 4, 12]
    size = ModelSize(TOTAL, 3 * (144 + EXPERTS * 240))
    experts = {"active_parameters": ACTIVE, "experts_per_token": PER_TOKEN} if known else {}
    return assemble(
        ratio=0.7,
        allocator="waterfill",
        allocation=Allocation(ranks, ranks),
        spectra=spectra,
        layers=[s.layer for s in spectra],
        size=size,
        budget_parameters=3_000,
        settings={
            "storage": storage,
            "metric": "weight",
            "multiple_of": 1,
        },
        provenance={
            "model": {"name": "m", "revision": None, "fingerprint": "0" * 64, "parameters": TOTAL}
            | experts,
            "calibration": None,
            "versions": VERSIONS,
        },
    )


def test_a_plan_counts_every_expert() -> None:
    plan = planned()
    stacks = [row.parameters for row in plan.sublayers if len(row.shape) == 3]
    assert stacks == [EXPERTS * 3 * 32, EXPERTS * 3 * 32, EXPERTS * 240]
    assert plan.full_parameters == 3 * (144 + 960)
    assert plan.kept_parameters == 3 * 4 * 24 + sum(stacks)
    experts = next(c for c in plan.clusters if c.cluster == "experts.gate_up_proj")
    assert experts.kept_ratio == pytest.approx(sum(stacks) / (3 * 960))


def test_a_plan_knows_what_a_token_uses() -> None:
    """2 of 4 experts per token: half of what stacks save, all of what other layers do."""
    plan = planned()
    sublayers = [Sublayer(s.name, s.layer, s.cluster, s.shape) for s in plan.sublayers]
    anatomy = Anatomy(sublayers, TOTAL, {}, PER_TOKEN)
    assert anatomy.active_parameters == TOTAL - 3 * 480 == ACTIVE
    assert replace(anatomy, experts_per_token=None).active_parameters is None
    less = 3 * (144 - 4 * 24) + 2 * (960 - EXPERTS * 96) // 2
    assert plan.active_parameters == (ACTIVE, ACTIVE - less)
    assert planned(known=False).active_parameters is None


@pytest.mark.parametrize("storage", ["pair", "pivoted"])
def test_a_plan_with_stacks_is_read_again(storage: str, tmp_path: Path) -> None:
    plan = planned(storage)
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    text = (tmp_path / "plan.json").read_text().replace(" ", "").replace("\n", "")
    assert '"shape":[4,20,12]' in text
    document = plan.document()
    rows = schemas.PLAN["properties"]["sublayers"]
    holds([{**row, "shape": list(row["shape"])} for row in document["sublayers"]], rows)
    holds(document["provenance"], schemas.PLAN["properties"]["provenance"])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("      4,\n        20,\n        12", "      0,\n        20,\n        12"),
        ('"experts_per_token": 2', '"experts_per_token": 0'),
        ('"active_parameters": 5328', '"active_parameters": "many"'),
        ('"bits": 16', '"bits": 8'),
    ],
)
def test_a_plan_with_damaged_stacks_is_rejected(before: str, after: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    planned().save(path)
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    with pytest.raises(SourceError, match="not a plan"):
        load_plan(path)


# What is shown


def test_views_name_the_experts(tmp_path: Path) -> None:
    lines = shown(plan_view(planned("pivoted"), 80, ranks=True))
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "experts.gate_up_proj 4 × (20×12)" in text
    dense, kept = planned("pivoted").active_parameters or (0, 0)
    assert f"active per token {kept:,} of {dense:,} parameters" in text
    assert "experts are plain pairs" in text
    planned().save(tmp_path / "plan.json")
    found = audit(str(tmp_path / "plan.json"), None, False, True, Silent())
    holds(found.document()["active_parameters"], schemas.COUNT)
    assert found.document()["dense_active_parameters"] == ACTIVE
    lines = shown(audit_view(found, 80, ranks=True))
    assert max(map(len, lines)) <= 80
    assert any("4 × (20×12)" in line and "experts.gate_up_proj" in line for line in lines)
    assert any(f"(dense {ACTIVE:,})" in line for line in lines)


def test_a_report_and_a_notebook_tell_what_a_token_uses() -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    result = PerplexityResult("t", "test", 48.0, 100, 2, 51, "none", "0" * 64, [])

    def page_of(plan: Plan) -> str:
        grid = Grid([Evaluation("m", [result])], None, [], [])
        return page.render(Report(grid, {"m": ModelFacts("m", 1000, plan)}, None, {}, VERSIONS))

    dense, kept = planned().active_parameters or (0, 0)
    text = page_of(planned())
    assert "active kept" in text
    assert f"{kept / dense:.1%}" in text
    assert "4 × (20×12)" in text
    assert "active kept" not in page_of(planned(known=False))
    shown_plan = repr(NotebookPlan(planned()))
    assert f"{kept:,} of {dense:,} parameters" in shown_plan
    assert "experts.gate_up_proj 4 × (20×12)" in shown_plan


def test_a_card_tells_what_a_token_uses(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    planned("pivoted").save(tmp_path / "plan.json")
    integers = {"bits": {"q": 8}, "group_size": 1, "bytes": 1, "dense_bytes": 2}
    record = {
        "model": {"name": "m"},
        "decomposer": "whitened",
        "calibration": None,
        "quantization": {**integers, "method": "nearest", "storage": "pivoted"},
    }
    rewrite_card(tmp_path, tmp_path / "made", record)
    text = (tmp_path / "made" / "README.md").read_text()
    dense, kept = planned("pivoted").active_parameters or (0, 0)
    assert f"| parameters kept, active per token | {kept / dense:.2%}" in text
    assert "experts as plain factors" in text
    assert "experts are not quantized" in text


def test_the_tensors_of_a_stack_are_those_of_its_experts_together() -> None:
    plan = planned("pivoted")
    sublayers = [Sublayer(s.name, s.layer, s.cluster, s.shape) for s in plan.sublayers]
    layout = Layout(plan.ranks, plan.storage)
    shapes = sublayer_shapes(sublayers, layout)
    stack = "model.layers.0.experts.gate_up_proj"
    own = {name: shape for name, shape in shapes.items() if name.startswith(stack)}
    assert own == {f"{stack}.weight": (4, 3, 12), f"{stack}.weight_u": (4, 20, 3)}
    assert not any("layers.2.experts" in name for name in shapes)
    assert shapes["model.layers.0.q_proj.weight_order"] == (12,)
    rows = rows_of(sublayers, {f"{stack}.weight": "float16"}, layout)
    assert [row.parameters for row in rows] == [row.parameters for row in plan.sublayers]
    assert (rows[1].dtype, rows[1].storage) == ("float16", "pair")
    held = TOTAL - plan.full_parameters + plan.kept_parameters
    active = plan.active_parameters
    assert active is not None
    assert active_on_disk(rows, held, TOTAL, PER_TOKEN) == (
        held - sum(row.parameters // 2 for row in rows[1::2]),
        TOTAL - 3 * 480,
    )
    assert active_on_disk(rows, held, TOTAL, None) is None
    assert active_on_disk(rows[::2], held, TOTAL, PER_TOKEN) is None


def test_members_are_the_linear_layers_of_the_experts() -> None:
    assert Sublayer("a.q_proj", 0, "q_proj", (12, 12)).members == ["a.q_proj"]
    assert Sublayer("a.up", 0, "up", (3, 20, 12)).members == ["a.up.0", "a.up.1", "a.up.2"]


def test_stacks_of_a_checkpoint_have_factors_of_three_dimensions() -> None:
    shapes = {
        **{"q.weight": (4, 12), "q.weight_u": (12, 4)},
        **{"up.weight": (4, 3, 12), "up.weight_u": (4, 20, 3)},
        **{"down.weight": (3, 20), "down.weight_u": (4, 12, 3), "damaged.weight": (3, 3)},
    }
    infos = {name: SimpleNamespace(shape=shape) for name, shape in shapes.items()}
    ranks = {"q": 4, "up": 3, "down": 3, "damaged": 3}
    found = SimpleNamespace(ranks=ranks, weights=SimpleNamespace(infos=infos))
    assert factored_stacks(cast(Checkpoint, found)) == ["up", "down"]


# Estimates


def work(experts: bool, per_token: int | None = None) -> Workload:
    """Return a workload with a stack, or its experts as plain layers, in each of two blocks."""
    sublayers = []
    for layer in range(2):
        name = f"layers.{layer}"
        sublayers.append(Sublayer(f"{name}.q", layer, "q", (64, 64)))
        kinds: list[Shape] = [(EXPERTS, 160, 64)] if experts else [(160, 64)] * EXPERTS
        sublayers += [
            Sublayer(f"{name}.up.{i}", layer, "up", shape) for i, shape in enumerate(kinds)
        ]
    cpu = torch.device("cpu")
    made = Workload(sublayers, 10_000, 64, 512, 512, 8, torch.float32, cpu)
    return replace(made, experts_per_token=per_token)


def test_experts_take_the_memory_of_as_many_layers() -> None:
    stack, plain = work(True), work(False)
    assert activations(stack.block, None) == activations(plain.block, None)
    for weights in (False, True):
        assert gradients_peak(stack, weights) == gradients_peak(plain, weights)
    cpu = torch.device("cpu")
    assert factoring_peak(stack.sublayers, 4, cpu) == factoring_peak(plain.sublayers, 4, cpu)
    # A token passes one expert: the same activations as with a single one, and the moments of all.
    assert calibration_peak(work(True, 1)) == calibration_peak(plain)
    assert calibration_peak(stack).host > calibration_peak(plain).host
    single = sum(decomposition_cost((160, 64)) for _ in range(EXPERTS))
    assert decomposition_cost((EXPERTS, 160, 64)) == single
    assert estimate_calibration(stack).bytes == estimate_calibration(plain).bytes


def test_a_token_uses_its_experts_alone() -> None:
    assert activations(work(True, 2).block, 2) == (64 + 64) + 2 * (160 + 64)
    assert activations(work(True, 9).block, 9) == (64 + 64) + EXPERTS * (160 + 64)


def test_rounding_counts_no_moments_of_stacks() -> None:
    """8 bytes for each entry of a moment; 4 more matrices of the widest input, and of the widest
    weight, are in float64 while one layer is rounded."""
    plain, stack = work(False), work(True, 1)
    moments = 8 * EXPERTS * 64**2
    rounded = 4 * 8 * (160 * 64 - 64 * 64)
    assert quantization_peak(plain).host - quantization_peak(stack).host == moments + rounded


def test_experts_per_token_have_many_names() -> None:
    from transformers import (
        Ernie4_5_MoeConfig,
        GptOssConfig,
        HunYuanMoEV1Config,
        LlamaConfig,
        MixtralConfig,
    )

    assert experts_per_token(MixtralConfig(num_experts_per_tok=3)) == 3
    assert experts_per_token(GptOssConfig(num_experts_per_tok=5)) == 5
    assert experts_per_token(Ernie4_5_MoeConfig(moe_k=6)) == 6
    assert experts_per_token(HunYuanMoEV1Config(moe_topk=[2, 2])) == 2
    assert experts_per_token(HunYuanMoEV1Config(moe_topk=[2, 4])) is None
    assert experts_per_token(LlamaConfig()) is None
