"""Adds measured results to a model card: the ``model-index`` and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hisvd_cli.calibration.text.datasets import NAMED
from hisvd_cli.modeling.checkpoints.folder_record import PROVENANCE, content_hash, renew_record
from hisvd_cli.modeling.checkpoints.record_schema import check_record
from hisvd_cli.modeling.sources.companions import CARD
from hisvd_cli.utils.errors import SourceError, reason
from hisvd_cli.utils.escaping import markdown_text
from hisvd_cli.utils.files.atomic import write_text
from hisvd_cli.utils.files.fingerprints import slug
from hisvd_cli.utils.files.json_files import read_json

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

TASK = "text-generation"
BEGIN = "<!-- hisvd: results, written again by every evaluation -->"
END = "<!-- hisvd: end of results -->"
_NOT_FINITE = "not finite"
_DENSE = "dense"


@dataclass(frozen=True)
class CardResult:
    """One result for a model card.

    Attributes:
        dataset: dataset as given by the user, or name of a task; of a path, only the file name is
            shown.
        metric: such as perplexity or accuracy.
        value: the result; None if it is not finite.
        split: split of the dataset.
        dense: result of the original model, if it was measured.
        details: evaluation settings, such as windows and seqlen.
    """

    dataset: str
    metric: str
    value: float | None
    split: str | None = None
    dense: float | None = None
    details: Mapping[str, str | int | float] = field(default_factory=dict)


def update_card(folder: Path, results: Sequence[CardResult]) -> None:
    """Add results to the card of a checkpoint: to its ``model-index`` and to its table.

    A result replaces an earlier one of the same metric, dataset, split and details. Other results
    and other text of the card are kept.

    Raises:
        SourceError: the folder has no card, or the card's metadata is damaged.
        OutputError: the card cannot be written.
    """
    before = content_hash(folder / CARD)
    card = _load_card(folder / CARD)
    data = cast("ModelCardData", card.data)
    kept = {_key(result): result for result in data.eval_results or []}
    for result in results:
        made = _eval_result(result)
        kept[_key(made)] = made
    data.model_name = data.model_name or _model_name(folder)
    data.eval_results = list(kept.values())
    card.text = _with_table(card.text, _table(data.eval_results))
    write_text(folder / CARD, str(card))
    renew_record(folder, CARD, before)


def check_card(folder: Path) -> None:
    """Check before any work that results can be added to the card of a checkpoint.

    Raises:
        SourceError: the folder has no card, or one without a name and no record, or one of them
            is damaged.
    """
    if not cast("ModelCardData", _load_card(folder / CARD).data).model_name:
        _model_name(folder)


def _load_card(path: Path) -> ModelCard:
    import yaml  # comes with huggingface_hub, which reads the metadata with it
    from huggingface_hub import ModelCard

    if not path.is_file():
        raise SourceError(
            f"{path.parent} has no {CARD}.", "Give a checkpoint folder written by hisvd."
        )
    try:
        return ModelCard(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise SourceError(
            f"The metadata of {path} is damaged: {reason(error)}",
            "Fix the YAML block between the first two lines of dashes.",
        ) from error


def _model_name(folder: Path) -> str:
    record = read_provenance(folder)
    return f"{slug(record['model']['name'])}-{record['ratio']:g}"


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return the parts of ``hisvd.json`` that a card shows. Raises SourceError."""
    path = folder / PROVENANCE
    try:
        record = read_json(path)
        check_record(record, str(path))
        known = {key: record[key] for key in ("model", "ratio", "decomposer", "calibration")}
        return {**known, **{key: record.get(key) for key in ("update", "stages", "recovery")}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path} is missing or damaged.", "Compress the model again.") from error


def _key(result: EvalResult) -> tuple[object, ...]:
    """Return what identifies a result: everything except the measured values."""
    details = {k: v for k, v in (result.metric_args or {}).items() if k != _DENSE}
    return (*result.unique_identifier, result.metric_type, repr(sorted(details.items())))


def _eval_result(result: CardResult) -> EvalResult:
    from huggingface_hub import EvalResult

    known = NAMED.get(result.dataset)
    name = Path(result.dataset).name
    details = dict(result.details)
    if result.dense is not None:
        details[_DENSE] = _rounded(result.dense)
    return EvalResult(
        task_type=TASK,
        dataset_type=known.repo if known else name,
        dataset_name=name,
        dataset_config=known.config if known else None,
        dataset_split=result.split,
        metric_type=result.metric,
        metric_name=result.metric,
        metric_value=_NOT_FINITE if result.value is None else _rounded(result.value),
        metric_args=details or None,
    )


def _rounded(value: float) -> float:
    """Round to five significant digits; further digits differ between machines."""
    return float(f"{value:.5g}")


def _table(results: Sequence[EvalResult]) -> str:
    lines = ["| dataset | metric | original | this model | settings |", "|---|---|---|---|---|"]
    for result in results:
        details = dict(result.metric_args or {})
        dense = details.pop(_DENSE, "not measured")
        digest = details.pop("text_sha256", None)
        settings = ", ".join(f"{name} {value}" for name, value in details.items())
        settings += f", text {str(digest)[:12]}" if digest else ""
        split = f" ({result.dataset_split})" if result.dataset_split else ""
        cells = (f"{result.dataset_name}{split}", result.metric_type, dense, result.metric_value)
        lines.append(f"| {' | '.join(map(markdown_text, (*cells, settings)))} |")
    return "\n".join(lines)


def _with_table(text: str, table: str) -> str:
    """Insert the table between its two markers, or append it if the markers were removed."""
    block = f"{BEGIN}\n{table}\n{END}"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        return f"{before}{block}{after}"
    return f"{text.rstrip()}\n\n## Evaluation\n\n{block}\n"
