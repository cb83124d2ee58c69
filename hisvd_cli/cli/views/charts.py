"""Charts in a terminal: heat maps and sparklines, also without colour."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from hisvd_cli.modeling.layers.shapes import Shape, numel

_BLOCKS = "▁▂▃▄▅▆▇█"
_LEVELS = len(_BLOCKS)
# Eight steps of viridis, whose lightness increases evenly (readable with colour-vision deficiency),
# each with a contrasting text colour.
_STYLES = (
    *("white on #440154", "white on #46327e", "white on #365c8d", "white on #21706f"),
    *("black on #1fa187", "black on #4ac16d", "black on #a0da39", "black on #fde725"),
)
_INDEX = 4  # columns of a block index
_GAP = 2  # columns between panels
_LINES = 20  # most blocks in a single panel


class Shaded(Protocol):
    """A layer of the heat map."""

    @property
    def layer(self) -> int | None: ...
    @property
    def cluster(self) -> str: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def parameters(self) -> int: ...
    @property
    def dense(self) -> bool: ...


def short_name(cluster: str) -> str:
    """Return a layer type without the suffix ``_proj``."""
    return cluster.removesuffix("_proj")


@dataclass(frozen=True)
class HeatMap:
    """The share of parameters that each layer keeps, in percent: a line per block and a column per
    layer type. 100 is a layer that stays dense.

    Many blocks are split into panels side by side; types that do not fit go below.
    """

    rows: Sequence[Shaded]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        colour = console.color_system is not None and not console.no_color
        clusters = list(dict.fromkeys(row.cluster for row in self.rows))
        cell = max(4, *(len(short_name(cluster)) for cluster in clusters)) + 1
        fit = max(1, (options.max_width - _INDEX) // cell)
        for start in range(0, len(clusters), fit):
            yield from self._block(clusters[start : start + fit], cell, options.max_width, colour)
            yield Text()
        yield _legend(colour)

    def _block(
        self, clusters: Sequence[str], cell: int, width: int, colour: bool
    ) -> Iterator[Text]:
        cells = {(row.layer, row.cluster): row for row in self.rows}
        layers = sorted({row.layer for row in self.rows if row.layer is not None})
        panel = _INDEX + cell * len(clusters)
        panels = max(1, min((width + _GAP) // (panel + _GAP), math.ceil(len(layers) / _LINES)))
        height = math.ceil(len(layers) / panels)
        columns = [layers[i : i + height] for i in range(0, len(layers), height)]
        names = "".join(f"{short_name(cluster):>{cell - 1}} " for cluster in clusters)
        header = Text(f"{'B':>{_INDEX - 1}} {names}", style="bold")
        yield Text(" " * _GAP).join([header] * len(columns))
        for i in range(height):
            line = [
                Text(f"{layers[i]:>{_INDEX - 1}} ").append_text(
                    Text().join(_cell(cells.get((layers[i], c)), cell, colour) for c in clusters)
                )
                for layers in columns
                if i < len(layers)
            ]
            yield Text(" " * _GAP).join(line)


def _cell(row: Shaded | None, width: int, colour: bool) -> Text:
    if row is None:
        return Text(f"{'-':>{width - 1}} ", style="dim")
    share = row.parameters / numel(row.shape)
    percent = 100 if row.dense else min(99, round(100 * share))
    return _shade(percent, width, colour)


def _shade(percent: int, width: int, colour: bool) -> Text:
    level = min(_LEVELS - 1, percent * _LEVELS // 100)
    if colour:
        return Text(f"{percent:>{width - 1}} ", style=_STYLES[level])
    return Text(f"{_BLOCKS[level]}{percent:>3}".rjust(width - 1) + " ")


def _legend(colour: bool) -> Text:
    steps = (_shade(math.ceil(100 * i / _LEVELS), 5, colour) for i in range(_LEVELS))
    return (
        Text("B: block; % kept, from ", style="dim")
        .append_text(Text().join(steps))
        .append(" (100: dense)", style="dim")
    )


def sparkline(values: Sequence[float], width: int, mark: int | None = None) -> Text:
    """Draw descending values on a logarithmic scale.

    Args:
        values: the values; if there are more than columns, each column shows a mean.
        width: maximum number of columns.
        mark: number of kept values, after which a line is drawn; the others are dimmed.
    """
    logs = _logarithms(values)
    columns = min(len(logs), width - (mark is not None))
    edges = [round(i * len(logs) / columns) for i in range(columns + 1)]
    means = [sum(logs[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    span = high - low or math.inf  # a flat spectrum is drawn at the bottom
    line = "".join(_BLOCKS[round((x - low) / span * (_LEVELS - 1))] for x in means)
    if mark is None:
        return Text(line)
    kept = round(mark * columns / len(logs))
    return Text.assemble((line[:kept], "cyan"), ("│", "bold"), (line[kept:], "dim"))


def _logarithms(values: Sequence[float]) -> list[float]:
    """Return log10 of each value; values that are not positive count as the smallest positive."""
    least = min((x for x in values if x > 0), default=1.0)
    return [math.log10(max(x, least)) for x in values]
