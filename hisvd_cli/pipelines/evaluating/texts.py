"""Loads and checks the texts to evaluate on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hisvd_cli.calibration.text.datasets import Text, load_text
from hisvd_cli.inspection.audit import part
from hisvd_cli.modeling.sources.source import DEMO, Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.evaluating.targets import is_demo
from hisvd_cli.pipelines.samples import default_dataset
from hisvd_cli.utils.errors import DataError


def pick_texts(resolved: Resolved, sources: Sequence[Source]) -> list[Text]:
    """Load the texts of the settings, by default the text of the models."""
    fallback = DEMO if any(map(is_demo, sources)) else default_dataset(sources[0])
    names = resolved.settings.eval.dataset or [fallback]
    return [load_text(name, "evaluation") for name in names]


def check_texts(texts: Sequence[Text], calibration: Mapping[str, Any], model: str) -> None:
    """Check that a model was not calibrated on a text that it is evaluated on.

    Args:
        texts: the texts.
        calibration: manifest of the model's calibration.
        model: name of the model, for the error.

    Raises:
        DataError: one of ``texts`` is the text of ``calibration``.
    """
    for text in texts:
        if part(calibration, "data").get("text_sha256") == text.digest:
            raise DataError(
                f"{model} was calibrated on '{text.name}' itself, so its perplexity there is "
                "meaningless.",
                "Evaluate on another text or split.",
            )
