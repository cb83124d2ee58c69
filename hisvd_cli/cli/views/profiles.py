"""Renders the list of shipped profiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hisvd_cli.cli.views.layout import make_table

if TYPE_CHECKING:
    from hisvd_cli.pipelines.config.shipped import ShippedProfile


def profiles_view(profiles: Sequence[ShippedProfile]) -> RenderableType:
    """Return each profile with the published and the measured perplexities of its model."""
    sources = list(dict.fromkeys(f.source for profile in profiles for f in profile.figures))
    parts: list[RenderableType] = []
    for profile in profiles:
        dense = "none found" if profile.dense is None else _number(profile.dense)
        parts.append(Text(f"{profile.name}: {profile.model}", style="bold"))
        parts.append(Text(f" dense {dense}", style="dim"))
        parts += [_figures(profile, sources), Text()]
    parts.append(
        Text("Perplexity on WikiText-2 by keep ratio: as published, and of your runs ('run').")
    )
    parts += [Text(f"[{i}] {source}", style="dim") for i, source in enumerate(sources, 1)]
    parts.append(Text("Run one: hisvd compress --profile NAME [--ratio 0.8] [--preset PRESET]"))
    return Group(*parts)


def _figures(profile: ShippedProfile, sources: Sequence[str]) -> Table:
    ratios = [f"{ratio:g}" for ratio in profile.ratios]
    names = ("method", "preset", "", *ratios, *(f"run {ratio}" for ratio in ratios))
    table = make_table(*names, left=3)
    for figure in profile.figures:
        found = [figure.published.get(ratio) for ratio in profile.ratios]
        measured = [figure.measured.get(ratio) for ratio in profile.ratios]
        table.add_row(
            figure.method,
            figure.preset or "-",
            f"[{sources.index(figure.source) + 1}]",
            *(_number(value) for value in [*found, *measured]),
        )
    if not profile.figures:
        table.add_row("none found")
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"
