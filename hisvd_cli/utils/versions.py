"""The library versions that every artifact records."""

from __future__ import annotations

from importlib.metadata import version

from hisvd_cli import __version__


def versions() -> dict[str, str]:
    """Return the versions of hisvd, torch and transformers."""
    return {
        "hisvd": __version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
