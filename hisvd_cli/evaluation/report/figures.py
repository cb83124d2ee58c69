"""Figures of a report as SVG, drawn by matplotlib and reproducible to the byte."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hisvd_cli.allocation.plan import Plan
from hisvd_cli.evaluation.perplexity import PerplexityResult
from hisvd_cli.evaluation.report.content import ModelFacts, Report, Spectra, short_name
from hisvd_cli.evaluation.report.palette import LINE, MARKERS, MUTED, SERIES, STYLES, TEXT, ink_on
from hisvd_cli.modeling.layers.shapes import numel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 4.0  # inches; text stays readable on a phone
_LOGARITHMIC = 5.0  # the axis is logarithmic if max/min reaches this
_NUMBERED = 400  # most cells of a heat map that get numbers
_STYLE: Any = {
    "svg.hashsalt": "hisvd",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": TEXT,
    "text.color": TEXT,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dfe3e7",
    "text.parse_math": False,  # names may contain $
}

Point = tuple[float, float, tuple[float, float] | None]
"""x, y and the confidence interval of y."""


@dataclass(frozen=True)
class Drawing:
    """A figure: title, SVG and text alternative."""

    title: str
    svg: str
    text: str


def curves(report: Report, index: int) -> list[Drawing]:
    """Return figures of perplexity and KL on a text, each against the share kept and the size."""
    drawn = []
    for figure, title in (("perplexity", "Perplexity"), ("kl", "KL")):
        for name, axis in (("share kept", _share), ("size", _megabytes)):
            made = _curve(report, index, figure, title, (name, axis))
            drawn += [made] if made else []
    return drawn


def _share(facts: ModelFacts) -> float | None:
    return facts.plan.kept_ratio if facts.plan else None


def _megabytes(facts: ModelFacts) -> float | None:
    return facts.bytes / 1e6


def _curve(
    report: Report,
    index: int,
    figure: str,
    title: str,
    x: tuple[str, Callable[[ModelFacts], float | None]],
) -> Drawing | None:
    from matplotlib.ticker import MaxNLocator

    name, axis = x
    series: dict[str, list[Point]] = {}
    baseline: float | None = None
    for each, facts, result in report.results(index):
        value = getattr(result, figure)
        if each is report.grid.baseline:
            baseline = value
        elif value is not None and (at := axis(facts)) is not None:
            series.setdefault(facts.series, []).append((at, value, _bounds(result, figure)))
    if not series:
        return None
    with _canvas(_WIDTH, 2.9) as (drawing, axes):
        _draw_series(axes, series)
        if baseline is not None:
            axes.axhline(baseline, color=LINE, linestyle=":", linewidth=1.2, label="baseline")
        values = [y for points in series.values() for _, y, _ in points]
        _scale(axes, [*values, *([baseline] if baseline else [])])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("keep ratio of the layers" if axis is _share else "weights in MB")
        axes.set_ylabel(title + (" from the baseline, nats/token" if figure == "kl" else ""))
        axes.grid(axis="y", linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)
        svg = _svg(drawing, f"{figure}-{name.replace(' ', '-')}-{index}")
    values_text = "; ".join(
        f"{label}: " + ", ".join(f"{y:.4g} at {at:.3g}" for at, y, _ in sorted(points))
        for label, points in series.items()
    )
    return Drawing(f"{title} against {name}", svg, f"{title} against {name}. {values_text}.")


def _bounds(result: PerplexityResult, figure: str) -> tuple[float, float] | None:
    found = (result.intervals or {}).get(figure)
    return (found[0], found[1]) if found else None


def _draw_series(axes: Axes, series: dict[str, list[Point]]) -> None:
    for i, (label, points) in enumerate(series.items()):
        xs, ys, bounds = zip(*sorted(points), strict=True)
        below = [max(0.0, y - b[0]) if b else 0.0 for y, b in zip(ys, bounds, strict=True)]
        above = [max(0.0, b[1] - y) if b else 0.0 for y, b in zip(ys, bounds, strict=True)]
        look: dict[str, Any] = {
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": STYLES[i % len(STYLES)],
        }
        colour = SERIES[i % len(SERIES)]
        axes.errorbar(
            xs, ys, [below, above], label=label, color=colour, capsize=3, markersize=5, **look
        )


def _scale(axes: Axes, values: Sequence[float]) -> None:
    if min(values) > 0 and max(values) >= _LOGARITHMIC * min(values):
        _logarithmic(axes, max(values) / min(values))


def _logarithmic(axes: Axes, span: float) -> None:
    """Set a logarithmic scale on the y axis, with plain numbers as labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if span > 100 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def heat_map(model: str, plan: Plan, number: int) -> Drawing:
    """Return a heat map of the share of its parameters that each linear layer keeps."""
    from matplotlib import colormaps

    clusters = [row.cluster for row in plan.clusters]
    layers = sorted({row.layer for row in plan.sublayers})
    shares = [[math.nan] * len(clusters) for _ in layers]
    for row in plan.sublayers:
        share = 100.0 if row.dense else 100 * row.parameters / numel(row.shape)
        shares[layers.index(row.layer)][clusters.index(row.cluster)] = share
    with _canvas(_WIDTH, 1.1 + 0.16 * len(layers)) as (drawing, axes):
        steps = colormaps["viridis"].resampled(20)  # matplotlib rasterizes finer colour bars
        mesh = axes.pcolormesh(shares, vmin=0, vmax=100, cmap=steps, edgecolor="white", lw=0.4)
        axes.set_yticks([i + 0.5 for i in range(len(layers))], [str(layer) for layer in layers])
        names = [cluster.removesuffix("_proj") for cluster in clusters]
        axes.set_xticks([i + 0.5 for i in range(len(clusters))], names)
        axes.tick_params(length=0, labelsize=8)
        axes.invert_yaxis()
        axes.set_ylabel("block")
        drawing.colorbar(mesh, ax=axes, label="% kept", fraction=0.06, pad=0.03)
        if len(layers) * len(clusters) <= _NUMBERED:
            _number_cells(axes, shares, mesh)
        svg = _svg(drawing, f"ranks-{number}")
    kept = ", ".join(f"{row.cluster} {row.kept_ratio:.0%}" for row in plan.clusters)
    return Drawing(short_name(model), svg, f"Share kept in {short_name(model)}, by type: {kept}.")


def _number_cells(axes: Axes, shares: Sequence[Sequence[float]], mesh: Any) -> None:
    from matplotlib.colors import to_hex

    for i, line in enumerate(shares):
        for j, share in enumerate(line):
            if not math.isnan(share):
                colour = ink_on(to_hex(mesh.cmap(mesh.norm(share))))
                where: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
                axes.text(j + 0.5, i + 0.5, f"{share:.0f}", color=colour, **where)


def spectra_figures(spectra: Spectra, plan: Plan) -> list[Drawing]:
    """Return the spectra of the first, the middle and the last block for each layer type."""
    drawn = []
    for number, cluster in enumerate(dict.fromkeys(row.cluster for row in plan.sublayers)):
        rows = [r for r in plan.sublayers if r.cluster == cluster and r.name in spectra.energies]
        chosen = list(dict.fromkeys([0, len(rows) // 2, len(rows) - 1])) if rows else []
        if not chosen:
            continue
        least = 1.0
        with _canvas(_WIDTH, 2.3) as (drawing, axes):
            for i, row in enumerate(rows[j] for j in chosen):
                energy = [e for e in spectra.energies[row.name] if e > 0] or [1.0]
                least = min(least, energy[-1] / energy[0])
                shown = range(0, len(energy), max(1, len(energy) // 200))
                axes.plot(
                    [100 * j / len(energy) for j in shown],
                    [energy[j] / energy[0] for j in shown],
                    color=SERIES[i],
                    linestyle=STYLES[i],
                    label=f"block {row.layer}",
                )
            _logarithmic(axes, 1 / least)
            axes.set_xlabel("component, in % of the full rank")
            axes.set_ylabel("energy, first = 1")
            axes.grid(axis="y", linewidth=0.6)
            axes.legend(frameon=False, fontsize=8)
            svg = _svg(drawing, f"spectrum-{number}")
        blocks = ", ".join(str(rows[j].layer) for j in chosen)
        text = f"{spectra.kind.capitalize()} spectra of {cluster}, blocks {blocks}, descending."
        drawn.append(Drawing(cluster, svg, text))
    return drawn


@contextmanager
def _canvas(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure and its axes in the style of the page, without a display."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()


def _svg(figure: Figure, name: str) -> str:
    """Return a figure as an ``svg`` element whose ids are unique on the page."""
    out = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=no_metadata)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{name}-", svg)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
