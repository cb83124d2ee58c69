"""How numbers and tables look to a person."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from hisvd_cli.audit import Audit, Row
from hisvd_cli.evaluate import PerplexityResult
from hisvd_cli.views import audit_view, duration_text, perplexity_text, rank_table, size_text


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
        " layer      q    fc1",
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
    assert sum(line.startswith(" layer") for line in lines) == 3
    assert max(map(len, lines)) <= 80
    assert all(any(cluster in line for line in lines) for cluster in clusters)


def test_long_lists_of_problems_are_cut() -> None:
    problems = [f"tensor {i}: missing." for i in range(30)]
    audit = Audit("checkpoint", "[x]", 1, 2, 3, [], {}, problems)
    lines = shown(audit_view(audit, 80))
    assert lines[0] == "[x]"
    assert "30 problems:" in lines
    assert sum(line.endswith("missing.") for line in lines) == 20
    assert lines[-1] == "  and 10 more (--json lists all)"
