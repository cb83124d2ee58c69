"""How numbers and tables look to a person."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hisvd_cli.allocation.plan import Plan
from hisvd_cli.allocation.plans.rows import ClusterPlan, SublayerPlan
from hisvd_cli.cli.views.charts import HeatMap, sparkline
from hisvd_cli.cli.views.layout import duration_text, perplexity_text
from hisvd_cli.cli.views.plans import comparison_view, plan_view
from hisvd_cli.cli.views.results import audit_view, compressed_view, rank_table
from hisvd_cli.evaluation.perplexity import PerplexityResult
from hisvd_cli.inspection.audit import Audit
from hisvd_cli.inspection.stored_sublayers import Row
from hisvd_cli.pipelines.compressing.outcome import Outcome
from hisvd_cli.pipelines.config.settings import ALLOCATOR_NAMES
from hisvd_cli.utils.quantities import size_text


def shown(renderable: object, width: int = 80) -> list[str]:
    console = Console(width=width, markup=False, highlight=False)
    with console.capture() as captured:
        console.print(renderable)
    return [line.rstrip() for line in captured.get().splitlines()]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (5_516_032, "5.5 MB"),
        (999_960, "1.0 MB"),
        (2.5e12, "2.5 TB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (12.34, "12.3 s"),
        (59.99, "1 min 00 s"),
        (245, "4 min 05 s"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_perplexities() -> None:
    result = PerplexityResult("t", "test", 48.0, 100, 2, 51, "none", "0" * 64, [])
    assert perplexity_text(result) == "48.00"
    assert perplexity_text(replace(result, perplexity=7.123456)) == "7.123"
    assert perplexity_text(replace(result, perplexity=123456.0)) == "1.235e+05"
    broken = replace(result, perplexity=None, nonfinite_windows=[3, 4])
    assert perplexity_text(broken) == "not finite (window 3)"
    assert perplexity_text(replace(result, perplexity=None)) == "not finite"


def rows(clusters: list[str], layers: int) -> list[Row]:
    return [
        Row(f"layers.{i}.{c}", i, c, (64, 48), 10 + i if i else 48, i == 0, "float32")
        for i in range(layers)
        for c in clusters
    ]


def test_the_rank_table() -> None:
    assert shown(rank_table(rows(["q_proj", "fc1"], 3), 80)) == [
        " block      q    fc1",
        "  full     48     48",
        "     0  dense  dense",
        "     1     11     11",
        "     2     12     12",
    ]


def test_a_type_that_some_layers_lack() -> None:
    some = [row for row in rows(["q_proj", "fc1"], 3) if row.name != "layers.1.fc1"]
    assert shown(rank_table(some, 80))[3] == "     1     11      -"


def test_types_that_do_not_fit_get_a_further_table() -> None:
    clusters = [f"a_rather_long_name_{i}" for i in range(7)]
    lines = shown(rank_table(rows(clusters, 2), 80), 80)
    assert sum(line.startswith(" block") for line in lines) == 3
    assert max(map(len, lines)) <= 80
    assert all(any(cluster in line for line in lines) for cluster in clusters)


def heat_map(clusters: list[str], layers: int, width: int = 80, **options: Any) -> list[str]:
    console = Console(width=width, _environ={}, **options)
    with console.capture() as captured:
        console.print(HeatMap(rows(clusters, layers)))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_a_heat_map_without_colour_shades_in_blocks() -> None:
    # Rank 11 of a 64 × 48 matrix takes 11·112 of 3072 parameters.
    assert heat_map(["q_proj", "fc1"], 3)[:4] == [
        "  B    q  fc1",
        "  0 █100 █100",
        "  1 ▄ 40 ▄ 40",
        "  2 ▄ 44 ▄ 44",
    ]
    told = heat_map(["q_proj"], 3, no_color=True, force_terminal=True, color_system="truecolor")
    assert "  0 █100" in told  # NO_COLOR in a terminal that could show it


def test_a_heat_map_in_colour() -> None:
    lines = heat_map(["q_proj"], 2, color_system="truecolor", force_terminal=True)
    assert "48;2;253;231;37m 100 " in lines[1]  # a dense one on the lightest
    assert "48;2;33;112;111m  40 " in lines[2]
    assert not set("▁▂▃▄▅▆▇█") & set("".join(lines))


LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("layers", "width", "height"), [(16, 80, 16), (32, 80, 16), (80, 80, 40), (80, 200, 20)]
)
def test_many_layers_are_folded(layers: int, width: int, height: int) -> None:
    lines = heat_map(LLAMA, layers, width)
    assert max(map(len, lines)) <= width
    table = lines[1 : lines.index("")]
    assert len(table) == height
    panel = 4 + 7 * 5 + 2
    starts = range(0, width - panel + 3, panel)
    labels = [line[start : start + 3].strip() for start in starts for line in table]
    assert [int(label) for label in labels if label] == list(range(layers))
    assert table[-1].split()[0] == str(height - 1)


def test_a_heat_map_of_types_that_do_not_fit() -> None:
    clusters = [f"a_rather_long_name_{i}" for i in range(7)]
    lines = heat_map(clusters, 2)
    assert max(map(len, lines)) <= 80
    assert all(any(cluster in line for line in lines) for cluster in clusters)


def test_sparklines() -> None:
    decades = [10.0**-i for i in range(8)]
    assert sparkline(decades, 80).plain == "█▇▆▅▄▃▂▁"
    assert sparkline(decades, 80, 3).plain == "█▇▆│▅▄▃▂▁"
    assert sparkline([x for x in decades for _ in range(500)], 9, 1500).plain == "█▇▆│▅▄▃▂▁"
    assert sparkline([4.0, 4.0], 80).plain == "▁▁"
    assert sparkline([1.0, 0.0, -1e-9], 80).plain == "▁▁▁"  # noise counts as the least
    assert sparkline([0.0], 80, 1).plain == "▁│"


def test_before_and_after() -> None:
    made = plan("uniform", {"q_proj": 0.325}, 1.0)  # 999 of 3072 parameters, of 4000 in all
    seconds = dict.fromkeys(("calibrate", "plan", "decompose", "write"), 1.0)
    outcome = Outcome(
        Path("made"), made, Path("p"), 3000, 8000, seconds, 10**9, None, "float32", "bfloat16"
    )
    lines = shown(compressed_view(outcome))
    assert " precision    forward passes in float32, weights in bfloat16" in lines
    assert lines[-3:] == [
        "             before   after  ratio",
        " parameters   4,000   1,927  48.2%",
        " size        8.0 kB  3.0 kB  37.5%",
    ]
    result = PerplexityResult("wiki", "test", 20.0, 100, 2, 51, "none", "0" * 64, [])
    outcome = replace(outcome, perplexity=(result, replace(result, perplexity=30.0)))
    lines = shown(compressed_view(outcome))
    assert lines[-2].split() == ["perplexity", "20.00", "30.00", "1.50", "×"]
    assert "2 windows of 51 tokens, wiki" in lines[-1]
    made.provenance["model"].pop("parameters")  # a plan from before it was recorded
    assert not any("parameters" in line for line in shown(compressed_view(outcome)))


def test_long_lists_of_problems_are_cut() -> None:
    problems = [f"tensor {i}: missing." for i in range(30)]
    audit = Audit("checkpoint", "[x]", 1, 2, 3, [], {}, problems)
    lines = shown(audit_view(audit, 80))
    assert lines[0] == "[x]"
    assert "30 problems:" in lines
    assert sum(line.endswith("missing.") for line in lines) == 20
    assert lines[-1] == "  and 10 more (--json lists all)"


def plan(
    allocator: str, kept: dict[str, float], loss: float, ratio: float = 0.8, metric: str = "fisher"
) -> Plan:
    return Plan(
        ratio=ratio,
        model_ratio=0.875,
        allocator=allocator,
        settings={"metric": metric, "multiple_of": 1},
        budget_parameters=1000,
        kept_parameters=999,
        predicted_loss=loss,
        clusters=[ClusterPlan(name, 2, None, 0.1, None, share) for name, share in kept.items()],
        sublayers=[SublayerPlan("l.0.q", 0, "q_proj", (64, 48), None, 9, 9, 48, False, 999, loss)],
        provenance={"calibration": "key", "model": {"parameters": 4000}},
    )


def test_plans_side_by_side() -> None:
    plans = [
        plan("uniform", {"q_proj": 0.8, "fc1": 0.8}, 12.5),
        plan("waterfill", {"q_proj": 0.456, "fc1": 1.0}, 10),
    ]
    assert shown(comparison_view(plans, 80)) == [
        "Share kept of each layer type at keep 0.8",
        " layer type      uniform  waterfill",
        " q_proj            80.0%      45.6%",
        " fc1               80.0%     100.0%",
        "",
        " whole model       87.5%      87.5%",
        " predicted loss  1.250 ×    1.000 ×",
        "",
        "Lowest predicted loss: 10 (error in the K-FAC metric of the loss).",
    ]


def test_each_ratio_is_compared_by_itself() -> None:
    plans = [
        plan(name, {"q_proj": ratio}, loss / ratio, ratio, "whitened")
        for name, loss in (("uniform", 3.0), ("hisvd", 2.0))
        for ratio in (0.8, 0.6)
    ]
    lines = shown(comparison_view(plans, 80))
    assert [line for line in lines if line.startswith("Share")] == [
        "Share kept of each layer type at keep 0.8",
        "Share kept of each layer type at keep 0.6",
    ]
    assert lines.count(" predicted loss  1.500 ×  1.000 ×") == 2
    assert "Lowest predicted loss: 2.5 (mean squared output error)." in lines
    assert "Lowest predicted loss: 3.33333 (mean squared output error)." in lines


def test_allocators_that_do_not_fit_get_a_further_table() -> None:
    plans = [plan(name, {"a_type_of_sublayer": 0.5}, 1.0) for name in ALLOCATOR_NAMES]
    lines = shown(comparison_view(plans, 80))
    assert sum(line.startswith(" layer type") for line in lines) == 2
    assert max(map(len, lines)) <= 80
    assert all(any(name in line.split() for line in lines) for name in ALLOCATOR_NAMES)
    assert sum(line.startswith(" a_type_of_sublayer") for line in lines) == 2


def test_losses_of_nothing_are_not_divided() -> None:
    plans = [plan("uniform", {"q_proj": 1.0}, 0.0), plan("hisvd", {"q_proj": 1.0}, 0.25)]
    assert " predicted loss        0    0.25" in shown(comparison_view(plans, 80))


@pytest.mark.parametrize(
    ("metric", "calibrated", "told"),
    [
        ("whitened", True, "mean squared output error"),
        ("fisher", True, "K-FAC"),
        ("weight", True, "energy of the weights"),
        ("whitened", False, "energy of the weights"),
    ],
)
def test_what_a_predicted_loss_is(metric: str, calibrated: bool, told: str) -> None:
    made = plan("uniform", {"q_proj": 0.8}, 1.0, metric=metric)
    made.provenance["calibration"] = "key" if calibrated else None
    lines = shown(plan_view(made, 200))
    assert lines[0] == "Share kept of each layer at keep 0.8 (uniform)"
    (line,) = [line for line in lines if line.startswith(" predicted loss")]
    assert told in line
