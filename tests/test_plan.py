"""Plans: totals that are true, a round trip that loses nothing."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest

from hisvd_cli.allocation.plan import load_plan
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.pipelines.config.resolution import resolve
from hisvd_cli.pipelines.planning.plans import make_plans
from hisvd_cli.utils.errors import BudgetError, SourceError, UsageError
from hisvd_cli.utils.progress import Silent
from tests.workbench import Bench, bench, plan_at


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench(tmp_path_factory.mktemp("plan"))


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.8, 0.95])
def test_size_is_within_a_twentieth_of_a_percent(made: Bench, ratio: float) -> None:
    plan = plan_at(made, ratio)
    total = sum(prod(row.shape) for row in plan.sublayers)
    recount = sum(
        prod(row.shape) if row.dense else row.rank * sum(row.shape) for row in plan.sublayers
    )
    assert plan.kept_parameters == recount
    assert 0 <= ratio * total - recount <= 0.0005 * total


def test_model_ratio_counts_every_parameter_once(made: Bench) -> None:
    _, source, _ = made
    plan = plan_at(made, 0.6)
    on_disk = sum(prod(info.shape) for info in source.weights.infos.values())
    kept = on_disk - plan.full_parameters + plan.kept_parameters
    assert plan.model_ratio == pytest.approx(kept / on_disk)


def test_ratio_of_the_model_counts_what_stays(made: Bench, tmp_path: Path) -> None:
    resolved = resolve(
        {("model", "name"): "demo", ("plan", "ratio_of"): "model"}, environ={}, start=tmp_path
    )
    _, source, calibration = made
    plan = make_plans(resolved, source, calibration, Silent(), [0.8])[0]
    assert plan.model_ratio <= 0.8
    assert plan.model_ratio == pytest.approx(0.8, abs=0.0005)
    with pytest.raises(BudgetError, match="embeddings"):
        make_plans(resolved, source, calibration, Silent(), [0.01])


def test_floors_are_a_share_of_an_equal_allocation(made: Bench, tmp_path: Path) -> None:
    flags = {("model", "name"): "demo", ("plan", "min_rank_ratio"): 0.9}
    resolved = resolve(flags, environ={}, start=tmp_path)
    _, source, calibration = made
    plan = make_plans(resolved, source, calibration, Silent(), [0.2])[0]
    for row in plan.sublayers:
        assert row.rank >= int(0.9 * 0.1999 * prod(row.shape) / sum(row.shape))
    assert plan.kept_ratio == pytest.approx(0.2, abs=0.0005)


def test_round_trip_through_a_file(made: Bench, tmp_path: Path) -> None:
    plan = plan_at(made, 0.6)
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("text", ["{}", "[]", "not json", '{"kind": "plan", "format_version": 99}'])
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(SourceError, match="not a plan"):
        load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("key", "value"), [("rank", "x"), ("rank", -5), ("rank", 10**6), ("shape", [3]), ("dense", {})]
)
def test_a_plan_edited_by_hand_is_checked(
    made: Bench, tmp_path: Path, key: str, value: object
) -> None:
    document = plan_at(made, 0.6).document()
    document["sublayers"][3][key] = value
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(SourceError, match="not a plan"):
        load_plan(tmp_path / "plan.json")


def test_a_plan_from_weights_alone_says_so(tmp_path: Path) -> None:
    resolved = resolve({("model", "name"): "demo"}, environ={}, start=tmp_path)
    plan = make_plans(resolved, open_source("demo"), None, Silent(), [0.6])[0]
    assert not plan.calibrated
    assert plan.kept_ratio == pytest.approx(0.6, abs=0.0005)


def test_include_and_exclude_choose_what_the_ratio_counts(made: Bench, tmp_path: Path) -> None:
    flags = {
        ("model", "name"): "demo",
        ("plan", "include"): ["mlp.*"],
        ("plan", "exclude"): ["up_proj"],
    }
    resolved = resolve(flags, environ={}, start=tmp_path)
    _, source, calibration = made
    plan = make_plans(resolved, source, calibration, Silent(), [0.5])[0]
    assert {row.cluster for row in plan.sublayers} == {"gate_proj", "down_proj"}
    assert plan.kept_ratio == pytest.approx(0.5, abs=0.0005)


def test_unknown_allocator_is_refused_before_any_work(made: Bench, tmp_path: Path) -> None:
    flags = {("model", "name"): "demo", ("plan", "allocator"): "unifrom"}
    resolved = resolve(flags, environ={}, start=tmp_path)
    with pytest.raises(UsageError) as caught:
        make_plans(resolved, made[1], None, Silent(), [0.5])
    assert "uniform" in caught.value.hint


def test_the_document_is_plain_json(made: Bench) -> None:
    document = plan_at(made, 0.7).document()
    assert json.loads(json.dumps(document, allow_nan=False))["ratio"] == 0.7
