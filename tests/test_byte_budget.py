"""Rank and bits chosen together: against every combination, and against bytes on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise, product
from math import ceil, prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hisvd_cli.allocation.budget import full_rank
from hisvd_cli.allocation.byte_budget import BITS, Candidate, Choice, choices, spend, stored_bytes
from hisvd_cli.allocation.byte_frontier import Point, frontier
from hisvd_cli.allocation.energies import weight_energy, whitened_energy
from hisvd_cli.allocation.plan import load_plan
from hisvd_cli.allocation.rounding_noise import Diagonals, Rounding, diagonals, rounding
from hisvd_cli.compression.rounding import round_nearest
from hisvd_cli.linalg.metric import Metric
from hisvd_cli.linalg.moments import Moment
from hisvd_cli.linalg.statistics import Channels, Gradient, Statistics
from hisvd_cli.linalg.truncation import truncate
from hisvd_cli.modeling.layers.shapes import matrix_of
from hisvd_cli.utils.errors import BudgetError
from tests import schemas
from tests.cli_helpers import QUICK, as_json, fail, succeed
from tests.test_json import holds

GROUP = 4
Words = tuple[object, ...]


def candidates(seed: int, count: int = 3) -> list[Candidate]:
    """Return sublayers small enough that all their combinations can be tried."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    found = []
    for shape in [(6, 8), (8, 5), (4, 4), (9, 6)][:count]:
        falling = torch.exp(-draw(1) * torch.arange(full_rank(shape)))
        energy = (100 * draw(1) * falling * (0.5 + draw(full_rank(shape)))).sort(descending=True)
        total = float(energy.values.sum())
        noise = {8: 1e-4 * float(draw(1)), 4: 0.03 * float(draw(1))}
        roundings = {bits: Rounding(eta, eta * total) for bits, eta in noise.items()}
        found.append(Candidate(shape, energy.values, energy.values, roundings))
    return found


def written_out(candidate: Candidate) -> list[Choice]:
    """Return every choice there is, its loss and bytes worked out number by number."""
    m, n = matrix_of(candidate.shape)
    full, energy = min(m, n), candidate.energy.tolist()
    weights = candidate.weight_energy.tolist()

    def matrix(rows: int, columns: int, bits: int) -> int:
        if bits == 16:
            return rows * columns * 2
        if bits == 8:
            return rows * (columns + 2)
        return rows * (ceil(columns / 2) + 2 * ceil(columns / GROUP))

    found = []
    for bits in (16, 8, 4):
        known = candidate.roundings.get(bits, Rounding(0.0, 0.0))
        found.append(Choice(full, bits, matrix(m, n, bits), known.loss))
        for r in range(1, full):
            share = sum(weights[:r]) / sum(weights)
            loss = sum(energy[r:]) + known.noise * sum(energy[:r]) + known.loss * share
            found.append(Choice(r, bits, matrix(r, n, bits) + matrix(m, r, bits), loss))
    return found


def options(found: list[Candidate]) -> list[list[Choice]]:
    return [choices(c, BITS, GROUP, 1) for c in found]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("ratio", [0.35, 0.5, 0.8])
def test_no_combination_is_better_by_more_than_a_step(seed: int, ratio: float) -> None:
    found = candidates(seed)
    budget = int(ratio * sum(c.full_bytes for c in found))
    made = spend(options(found), budget)
    all_of = [written_out(c) for c in found]
    for choice, own in zip(made, all_of, strict=True):
        same = next(c for c in own if (c.rank, c.bits) == (choice.rank, choice.bits))
        assert choice.price == same.price
        assert choice.loss == pytest.approx(same.loss)
    assert sum(c.price for c in made) <= budget
    least = min(
        sum(c.loss for c in each)
        for each in product(*all_of)
        if sum(c.price for c in each) <= budget
    )
    step = max(a[1] - b[1] for own in all_of for a, b in pairwise(hull(own)))
    assert least - 1e-9 <= sum(c.loss for c in made) <= least + step + 1e-9


def hull(own: list[Choice]) -> list[tuple[int, float]]:
    """Return the corners below all choices, by trying from each which next one falls fastest."""
    points = sorted({(c.price, c.loss) for c in own})
    corner = min(points)
    corners = [corner]
    while later := [p for p in points if p[0] > corner[0] and p[1] < corner[1]]:
        here = corner
        corner = min(later, key=lambda p, h=here: ((p[1] - h[1]) / (p[0] - h[0]), -p[0]))  # type: ignore[misc]
        corners.append(corner)
    return corners


@pytest.mark.parametrize("seed", range(6))
def test_what_is_left_pays_for_no_better_choice(seed: int) -> None:
    found = candidates(seed, 4)
    budget = int(0.4 * sum(c.full_bytes for c in found))
    made = spend(options(found), budget)
    left = budget - sum(c.price for c in made)
    for now, own in zip(made, map(written_out, found), strict=True):
        better = [c.price - now.price for c in own if c.loss < now.loss - 1e-12]
        assert all(price > left for price in better)


def test_losses_fall_with_the_budget_and_stay_below_every_single_way() -> None:
    found = candidates(3, 4)
    full = sum(c.full_bytes for c in found)
    ratios = [0.35, 0.4, 0.5, 0.6, 0.8, 1.0]
    points = frontier(found, {r: int(r * full) for r in ratios}, GROUP, 1)
    losses = [p.predicted_loss for p in points if p.method == "joint"]
    assert len(losses) == len(ratios)
    assert losses == sorted(losses)  # at the largest ratio first
    assert losses[0] == 0
    for point in points:
        assert point.bytes_ratio > 0
        if point.method in ("joint", "16 bit ranks", "16 bit pivoted"):
            assert point.budget is not None
            assert point.bytes_ratio <= point.budget
    joint = {p.budget: p.predicted_loss for p in points if p.method == "joint"}
    step = max(a[1] - b[1] for c in found for a, b in pairwise(hull(written_out(c))))
    for point in points:
        if point.method == "16 bit ranks":
            assert joint[point.budget] <= point.predicted_loss + step


def test_published_layouts_take_what_their_files_hold() -> None:
    """One matrix, large enough that its rank can be read off what it claims."""
    energy = torch.ones(96, dtype=torch.float64)
    rounding_of = {8: Rounding(0.0, 0.0), 4: Rounding(1.0, 1.0)}
    wide, tall = (Candidate(shape, energy, energy, rounding_of) for shape in [(96, 160), (160, 96)])
    for candidate in (wide, tall):
        full = candidate.full_bytes
        points = {p.method: p for p in frontier([candidate], {0.5: full // 2}, 64, 1)}
        rank = 96 // 2  # k·160 of 96·160 numbers
        dobi = rank * (96 + 96 + 2 * (160 - 96)) + rank * 2 * 2  # bytes, halves, two scales each
        assert points["dobi-svd remap"].bytes_ratio == dobi / full
        assert points["zs-svd remap"].bytes_ratio == rank * (96 + 160) * 2 / full
        m, n = matrix_of(candidate.shape)
        ranks = range(1, 96)
        pivoted = [2 * (r * n + (m - r) * r) + 4 * m for r in ranks]  # V′, C, order of the rows
        assert (
            points["16 bit pivoted"].bytes_ratio == max(p for p in pivoted if p <= full // 2) / full
        )
        assert points["zs-svd half"].bytes_ratio == (m * n + 2 * m) / full  # all kept at 8 bits
        assert points["int8 dense"].bytes_ratio == (m * n + 2 * m) / full
        assert points["int4 dense"].bytes_ratio == pytest.approx(
            (m * n / 2 + 2 * m * ceil(n / 64)) / full
        )


def test_layouts_from_16_bits_are_no_points_of_a_float32_model() -> None:
    found = [
        Candidate(c.shape, c.energy, c.weight_energy, c.roundings, width=4) for c in candidates(0)
    ]
    methods = {
        p.method for p in frontier(found, {0.5: sum(c.full_bytes for c in found) // 2}, 4, 1)
    }
    unrounded = {"16 bit ranks", "16 bit pivoted"}
    assert methods == {"joint", *unrounded, "int8 dense", "int4 dense"}


def test_floors_and_steps_of_ranks_are_kept_to() -> None:
    floored = replace(candidates(1, 1)[0], floor=2)
    ranks = {c.rank for c in choices(floored, BITS, GROUP, 2)}
    assert ranks <= {2, 4, 6}


def test_a_budget_below_the_least_is_refused() -> None:
    found = candidates(0)
    least = sum(min(c.price for c in written_out(each)) for each in found)
    assert sum(c.price for c in spend(options(found), least)) == least
    with pytest.raises(BudgetError, match=f"take {least}"):
        spend(options(found), least - 1)


# --- the estimate, against factors that were rounded


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rank", [16, 48, 80])
def test_the_estimate_is_near_what_rounding_the_factors_loses(bits: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    scales = torch.exp(draw(128) / 2)
    weight = (draw(96, 96) * torch.exp(-torch.arange(96) / 40)) @ draw(96, 128) / 40
    moment = Moment(torch.diag(scales.square()) + 0.1 * torch.ones(128, 128).double(), "input")
    g = moment.matrix

    def stored(matrix: torch.Tensor) -> torch.Tensor:
        return round_nearest(matrix, bits, 64).matrix().double()

    known = rounding(weight, stored, diagonals("whitened", 96, Statistics(moment), 0, 0))
    error = weight - stored(weight)
    assert known.loss == pytest.approx(float((error @ g * error).sum()), rel=0.1)
    candidate = Candidate(
        (96, 128), whitened_energy(weight, moment), weight_energy(weight), {bits: known}
    )
    u, v = truncate(weight, Metric(right=moment), rank)
    error = weight - stored(u) @ stored(v)
    truncated = float(candidate.losses(16)[rank])
    added = float((error @ g * error).sum()) - truncated
    predicted = float(candidate.losses(bits)[rank]) - truncated
    assert predicted == pytest.approx(added, rel=0.5)


def test_diagonals_are_those_of_the_metric() -> None:
    h, g = torch.diag(torch.tensor([1.0, 3.0])), torch.diag(torch.tensor([2.0, 4.0, 6.0]))
    gradient = Gradient(Moment(h, "output"), 2.0)
    known = Statistics(Moment(g, "input"), None, gradient)
    assert diagonals("weight", 2, known, 0, 0) == Diagonals()
    found = diagonals("fisher", 2, known, 0.5, 1.0)
    assert found.inputs is not None
    assert found.outputs is not None
    assert found.inputs.tolist() == [3.0, 4.0, 5.0]  # halfway to their mean
    assert found.outputs.tolist() == [2.0, 2.0]
    far = Statistics(
        Moment(h, "output"), Channels(g.diagonal(), g.diagonal()), Gradient(Moment(g, "input"), 7.0)
    )
    other = diagonals("held-out", 2, far, 0.0, 0.0)
    assert other.inputs is not None
    assert other.outputs is not None
    assert (other.inputs.tolist(), other.outputs.tolist()) == ([2.0, 4.0, 6.0], [7.0, 7.0])
    weight = torch.tensor([[1.0, -1.0, 2.0], [0.5, 0.25, 1.0]])
    made = rounding(weight, torch.zeros_like, diagonals("fisher", 2, known, 0, 0))
    assert made.noise == 1
    assert made.loss == 1 * 2 + 1 * 4 + 4 * 6 + 3 * (0.25 * 2 + 0.0625 * 4 + 6)
    assert rounding(torch.zeros(2, 3), torch.zeros_like, Diagonals()) == Rounding(0.0, 0.0)


# --- the command line


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Words:
    """Flags of the demo model with a calibration."""
    folder = tmp_path_factory.mktemp("bytes")
    words = (*QUICK, "--calibration", folder / "calibration")
    succeed("calibrate", *words, env={"HISVD_CACHE": str(folder / "cache")})
    return words


def test_a_plan_by_bytes(demo: Words, here: Path) -> None:
    words = ("plan", *demo, "--bytes-ratio", 0.25)
    document = holds(as_json(*words, "--output", "plan.json"), schemas.PLAN)
    counted, rows = document["bytes"], document["sublayers"]
    assert counted["full"] == sum(2 * prod(row["shape"]) for row in rows)
    assert counted["budget"] == int(0.25 * counted["full"])
    assert counted["kept"] == sum(row["bytes"] for row in rows)
    assert 0.24 * counted["full"] < counted["kept"] <= counted["budget"]
    for row in rows:
        shape, rank = tuple(row["shape"]), row["rank"]
        assert row["bytes"] == stored_bytes(shape, rank, row["bits"], 64, 2)
        assert row["dense"] == (rank == row["full_rank"])
    assert {row["bits"] for row in rows} <= {16, 8, 4}
    assert document["predicted_loss"] == pytest.approx(sum(row["loss"] for row in rows))
    joint = [p for p in counted["frontier"] if (p["method"], p["budget"]) == ("joint", 0.25)]
    assert joint[0]["predicted_loss"] == pytest.approx(document["predicted_loss"])
    assert joint[0]["bytes_ratio"] == counted["kept"] / counted["full"]
    plan = load_plan(here / "plan.json")
    assert json.loads(json.dumps(plan.document())) == document
    assert plan.bits == {row["name"]: row["bits"] for row in rows if row["bits"] < 16}
    assert plan.bytes is not None
    assert isinstance(plan.bytes.frontier[0], Point)


@pytest.mark.usefixtures("here")
def test_of_the_whole_model_the_rest_counts_too(demo: Words) -> None:
    document = as_json("plan", *demo, "--bytes-ratio", 0.4, "--ratio-of", "model")
    counted = document["bytes"]
    rest = counted["model"] - counted["full"]
    assert counted["budget"] + rest == int(0.4 * counted["model"])
    assert 0.395 < (rest + counted["kept"]) / counted["model"] <= 0.4
    message, _ = fail("plan", *demo, "--bytes-ratio", 0.1, "--ratio-of", "model")
    assert "uncompressed weights take" in message


@pytest.mark.usefixtures("here")
def test_a_plan_of_an_earlier_version_still_loads(demo: Words) -> None:
    succeed("plan", *demo, "--ratio", 0.6, "--output", "plan.json")
    document = json.loads(Path("plan.json").read_text())
    del document["bytes"]
    for row in document["sublayers"]:
        del row["bits"], row["bytes"]
    Path("old.json").write_text(json.dumps(document))
    old = load_plan(Path("old.json"))
    assert old == load_plan(Path("plan.json"))
    assert (old.bytes, old.bits) == (None, {})


@pytest.mark.usefixtures("here")
def test_the_view_fits_80_columns(demo: Words) -> None:
    shown = succeed("plan", *demo, "--bytes-ratio", 0.2, "--verbose").stdout
    assert max(map(len, shown.splitlines())) <= 80
    for word in ("16 bit", "dobi-svd remap", "zs-svd half", "int4 dense", "actual bytes ratio"):
        assert word in shown
    assert "/4" in shown


def test_a_checkpoint_takes_the_bytes_that_its_plan_counts(demo: Words, here: Path) -> None:
    words = ("compress", *demo, "--bytes-ratio", 0.2, "--no-evaluate")
    forecast = as_json(*words, "--dry-run")
    made = holds(as_json(*words), schemas.COMPRESS)
    folder = Path(made["output"])
    assert folder.name == "demo-bytes-0.2"
    plan = load_plan(folder / "plan.json")
    assert plan.bytes is not None
    assert set(plan.bits.values()) <= {8, 4}
    on_disk = dict.fromkeys((row.name for row in plan.sublayers), 0)
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if name.rpartition(".")[0] in on_disk:
                on_disk[name.rpartition(".")[0]] += tensor.nbytes
    assert on_disk == {row.name: row.bytes for row in plan.sublayers}
    assert sum(on_disk.values()) == plan.bytes.kept
    assert forecast["bytes"] - 0.005 * plan.bytes.full < made["bytes"] <= forecast["bytes"] + 2**16
    assert not list(here.glob(".*"))
    assert as_json("inspect", folder)["problems"] == []


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--bytes-ratio", 1.2), 2, "at most 1"),
        (("--bytes-ratio", 0), 2, "above 0"),
        (("--bytes-ratio", 0.3, "--ratio", 0.6), 2, "a plan has one limit"),
        (("--bytes-ratio", 0.3, "--allocator", "hisvd"), 2, "cannot share a budget of bytes"),
        (("--bytes-ratio", 0.3, "--preset", "lems"), 2, "lems chooses ranks only"),
        (("--bytes-ratio", 0.3, "--storage", "pivoted"), 2, "amplify the rounding error"),
        (("--bytes-ratio", 0.3, "--preset", "best", "--preset", "lems"), 2, "presets"),
        (("--bytes-ratio", 0.001), 1, "cannot be met"),
        (("--bytes-ratio", 0.1, "--multiple-of", 64), 1, "cannot be met"),
    ],
)
def test_what_cannot_be_planned(
    words: tuple[Any, ...], code: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("plan", "compress"):
        message, hint = fail(command, "--model", "demo", *words, code=code)
        assert told in message
        assert hint


@pytest.mark.usefixtures("here")
def test_a_profile_gives_way_to_the_command_line(demo: Words) -> None:
    Path("hisvd.toml").write_text("[plan]\nratio = [0.8, 0.6]\n")
    assert as_json("plan", *demo, "--bytes-ratio", 0.3)["bytes"]["ratio"] == 0.3
    Path("hisvd.toml").write_text("[plan]\nbytes_ratio = 0.3\n")
    assert as_json("plan", *demo, "--ratio", 0.6)["bytes"] is None
    Path("hisvd.toml").write_text("[plan]\nbytes_ratio = 0.3\nratio = 0.6\n")
    assert "one limit" in fail("plan", *demo, code=2)[0]


@pytest.mark.usefixtures("here")
def test_gptq_is_counted_on(demo: Words) -> None:
    def lost(*words: str) -> float:
        found = as_json("plan", *demo, "--bytes-ratio", 0.2, *words)["bytes"]
        assert found["method"] == ("gptq" if words else "nearest")
        points = {p["method"]: p["predicted_loss"] for p in found["frontier"]}
        return float(points["int4 dense"])

    assert lost("--quantize-method", "gptq") == pytest.approx(0.27 * lost())


@pytest.mark.usefixtures("here")
def test_bits_are_the_plans_alone(demo: Words) -> None:
    words = ("compress", *demo, "--bytes-ratio", 0.3, "--quantize", "int8")
    assert "chooses the bits" in fail(*words, code=2)[0]
    succeed("plan", *demo, "--bytes-ratio", 0.3, "--output", "plan.json")
    for flag in ("--quantize", "int8"), ("--quantize-method", "gptq"), ("--group-size", 32):
        message, _ = fail("compress", *demo, "--plan", "plan.json", *flag, code=2)
        assert flag[0] in message
