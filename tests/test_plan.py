"""Plans: totals that are true, a round trip that loses nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest

from hisvd_cli import compress
from hisvd_cli.allocation.plan import load_plan
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.pipelines.config.resolution import resolve
from hisvd_cli.pipelines.planning.plan_files import open_plan
from hisvd_cli.pipelines.planning.plans import make_plans
from hisvd_cli.utils.errors import BudgetError, SourceError, UsageError
from hisvd_cli.utils.progress import Silent
from tests.cli_helpers import untouched
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


@pytest.mark.parametrize("ratio", [1e-7, 1e-300])
def test_a_ratio_of_sublayers_that_keeps_nothing(made: Bench, ratio: float) -> None:
    with pytest.raises(BudgetError, match="minimum ranks take") as caught:
        plan_at(made, ratio)
    assert "whole model" not in caught.value.message
    assert "ratio_of" not in caught.value.hint


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


Edit = Callable[[dict[str, Any]], None]
NAME = "model.layers.1.mlp.up_proj"


def row_of(document: dict[str, Any], name: str = NAME) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in document["sublayers"] if row["name"] == name)
    return found


def edited(made: Bench, path: Path, edit: Edit) -> dict[str, Any]:
    """Write a plan of the demo model, changed by ``edit``."""
    document: dict[str, Any] = json.loads(json.dumps(plan_at(made, 0.6).document()))
    edit(document)
    path.write_text(json.dumps(document))
    return document


def counted(document: dict[str, Any]) -> None:
    """Set all that follows from the ranks of a plan in pairs, counted here once more."""
    for row in document["sublayers"]:
        m, n = row["shape"]
        row["dense"] = row["rank"] * (m + n) >= m * n
        row["parameters"] = m * n if row["dense"] else row["rank"] * (m + n)
    rows = document["sublayers"]
    for each in document["clusters"]:
        mine = [row for row in rows if row["cluster"] == each["cluster"]]
        each["sublayers"] = len(mine)
        each["kept_ratio"] = sum(r["parameters"] for r in mine) / sum(
            prod(r["shape"]) for r in mine
        )
    kept, total = sum(r["parameters"] for r in rows), document["provenance"]["model"]["parameters"]
    full = sum(prod(row["shape"]) for row in rows)
    document |= {"kept_parameters": kept, "model_ratio": round((total - full + kept) / total, 6)}


def raised(document: dict[str, Any]) -> None:
    row_of(document)["rank"] += 2


def without_a_row(document: dict[str, Any]) -> None:
    document["sublayers"].remove(row_of(document))


def twice(document: dict[str, Any]) -> None:
    document["sublayers"].append(row_of(document))
    counted(document)


def test_a_changed_rank_must_be_followed_by_all_that_depends_on_it(
    made: Bench, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    document = edited(made, path, raised)
    row, before = row_of(document), document["kept_parameters"]
    m, n = row["shape"]
    with pytest.raises(SourceError) as caught:
        load_plan(path)
    rank = row["rank"]
    told = f"rank {rank} of shape [{m}, {n}] in pair storage requires {rank * (m + n)}"
    assert f"{NAME} has parameters {row['parameters']}, but {told}" in caught.value.message
    kept = before + 2 * (m + n)
    assert f"kept_parameters is {before}, but the ranks require {kept}" in caught.value.message
    counted(document)
    assert f"the ranks require {document['model_ratio']:.6f}" in caught.value.message
    path.write_text(json.dumps(document))
    assert open_plan(path, made[1]).kept_parameters == kept


def test_a_plan_may_leave_layers_out_if_its_totals_do(made: Bench, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    document = edited(made, path, without_a_row)
    with pytest.raises(SourceError, match="cluster up_proj has sublayers 6, but 5 are listed"):
        load_plan(path)
    counted(document)
    path.write_text(json.dumps(document))
    assert NAME not in open_plan(path, made[1]).ranks


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (twice, f"{NAME} is listed twice"),
        (lambda d: row_of(d).update(full_rank=3), f"{NAME} has full_rank 3"),
        (lambda d: row_of(d).update(dense=True), f"{NAME} has dense true"),
        (lambda d: d.update(model_ratio=0.5), "model_ratio is 0.500000"),
        (lambda d: d["clusters"].pop(), "clusters lists"),
        (lambda d: d["clusters"][0].update(kept_ratio=0.1), "kept_ratio 0.100000"),
    ],
)
def test_values_of_a_plan_that_disagree(made: Bench, tmp_path: Path, edit: Edit, told: str) -> None:
    edited(made, tmp_path / "plan.json", edit)
    with pytest.raises(SourceError, match="disagree") as caught:
        load_plan(tmp_path / "plan.json")
    assert told in caught.value.message


def renamed(document: dict[str, Any]) -> None:
    row_of(document)["name"] = "model.layers.1.mlp.upproj"


def all_foreign(document: dict[str, Any]) -> None:
    for i, row in enumerate(document["sublayers"]):
        row["name"] = f"\x1b[31mlayer-{i}"


def wider(document: dict[str, Any]) -> None:
    row = row_of(document)
    row["shape"] = [row["shape"][0], row["shape"][1] + 1]
    row["full_rank"] = min(row["shape"])
    counted(document)


def moved(document: dict[str, Any]) -> None:
    row_of(document)["layer"] = 0


def of_another_type(document: dict[str, Any]) -> None:
    row_of(document)["cluster"] = "gate_proj"
    counted(document)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (renamed, f"no layer 'model.layers.1.mlp.upproj'. Did you mean '{NAME}'?"),
        (all_foreign, "more rows do not fit"),
        (wider, f"{NAME} has shape ["),
        (moved, f"{NAME} has layer 0, not 1"),
        (of_another_type, f"{NAME} has cluster gate_proj, not up_proj"),
    ],
)
def test_rows_that_do_not_fit_the_model(made: Bench, here: Path, edit: Edit, told: str) -> None:
    edited(made, here / "plan.json", edit)
    words = ("compress", "--model", "demo", "--dtype", "float32", "--plan", "plan.json")
    for more in ((), ("--dry-run",)):
        message, _ = untouched(here, *words, *more, "--output", "made")
        assert told in message
        assert "\x1b" not in message
    with pytest.raises(SourceError, match="does not fit demo"):
        compress(here / "plan.json", output=here / "made", progress=False)


def test_the_bytes_of_a_plan_follow_its_ranks(made: Bench, tmp_path: Path) -> None:
    resolved, source, calibration = made
    flags = {("model", "name"): "demo", ("plan", "bytes_ratio"): 0.3}
    resolved = resolve(flags, environ={}, start=tmp_path)
    plan = make_plans(resolved, source, calibration, Silent())[0]
    document = json.loads(json.dumps(plan.document()))
    row = next(row for row in document["sublayers"] if not row["dense"])
    row["rank"] -= 1
    row["bits"] = 16
    counted(document)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    m, n = row["shape"]
    size = row["rank"] * (m + n) * source.weights.infos[f"{row['name']}.weight"].nbytes // (m * n)
    with pytest.raises(SourceError, match=f"rank {row['rank']} takes {size}"):
        open_plan(path, source)
    row["bytes"] = size
    path.write_text(json.dumps(document))
    stored = sum(row["bytes"] for row in document["sublayers"])
    with pytest.raises(SourceError, match=f"bytes of the layers sum to {stored}"):
        open_plan(path, source)
    document["bytes"]["kept"] = stored
    path.write_text(json.dumps(document))
    assert open_plan(path, source).bytes


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
