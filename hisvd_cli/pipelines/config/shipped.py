"""Shipped profiles: a model and an evaluation protocol each, with published perplexities."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli

FOLDER = Path(__file__).parent / "profiles"
_PUBLISHED = "published.json"

Measured = Callable[[str, str, float], float | None]
"""(profile, preset, ratio) → measured perplexity, None if unknown."""


@dataclass(frozen=True)
class Figure:
    """Perplexities on WikiText-2 of one method.

    Attributes:
        method: name in the source.
        preset: the corresponding preset, if any.
        source: paper and table, or README.
        published: keep ratio → published perplexity, if any.
        measured: keep ratio → measured perplexity, if any.
    """

    method: str
    preset: str | None
    source: str
    published: dict[float, float]
    measured: dict[float, float]


@dataclass(frozen=True)
class ShippedProfile:
    """A shipped profile: its name, model and keep ratios, the published perplexity of the dense
    model (None if unknown), and those of each method."""

    name: str
    model: str
    ratios: list[float]
    dense: float | None
    figures: list[Figure]

    def document(self) -> dict[str, Any]:
        """Return the profile as JSON data."""
        figures = [
            {
                **asdict(figure),
                "published": {f"{ratio:g}": value for ratio, value in figure.published.items()},
                "measured": {f"{ratio:g}": value for ratio, value in figure.measured.items()},
            }
            for figure in self.figures
        ]
        return {**asdict(self), "figures": figures}


def shipped_profiles(measured: Measured | None = None) -> list[ShippedProfile]:
    """Return all shipped profiles by name.

    Args:
        measured: looks up measured perplexities.
    """
    published = json.loads((FOLDER / _PUBLISHED).read_text(encoding="utf-8"))
    profiles = []
    for path in sorted(FOLDER.glob("*.toml")):
        settings = tomli.loads(path.read_text(encoding="utf-8"))
        ratios = settings["plan"]["ratio"]
        known = published["profiles"].get(path.stem, {"dense": None, "figures": []})
        figures = [
            Figure(
                method=row["method"],
                preset=row["preset"],
                source=published["sources"][row["source"]],
                published={float(ratio): value for ratio, value in row["perplexity"].items()},
                measured=_looked_up(measured, path.stem, row["preset"], ratios),
            )
            for row in known["figures"]
        ]
        model = settings["model"]["name"]
        profiles.append(ShippedProfile(path.stem, model, ratios, known["dense"], figures))
    return profiles


def _looked_up(
    measured: Measured | None, profile: str, preset: str | None, ratios: list[float]
) -> dict[float, float]:
    if measured is None or preset is None:
        return {}
    found = {ratio: measured(profile, preset, ratio) for ratio in ratios}
    return {ratio: value for ratio, value in found.items() if value is not None}
