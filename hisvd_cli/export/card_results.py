"""Adds measured results to a model card: its ``model-index`` and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hisvd_cli.calibration.text.datasets import NAMED
from hisvd_cli.modeling.checkpoints.folder_record import PROVENANCE, content_hash, renew_record
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
    """One measurement for a card.

    Attributes:
        dataset: as the user named it, or a task's name; of a path only the file's name is shown.
        metric: perplexity, accuracy and the like.
        value: what was measured; None where it is not finite.
        split: of the dataset.
        dense: the same of the model before compression, where that was measured.
        details: how it was measured, such as windows and seqlen.
    """

    dataset: str
    metric: str
    value: float | None
    split: str | None = None
    dense: float | None = None
    details: Mapping[str, str | int | float] = field(default_factory=dict)


def update_card(folder: Path, results: Sequence[CardResult]) -> None:
    """Put results into the card of a checkpoint: its ``model-index``, and the table of its text.

    A result replaces that of the same metric, dataset, split and details; all others stay, and so
    does what the user wrote elsewhere in the card.

    Raises:
        SourceError: the folder has no card, or its metadata is damaged.
        OutputError: it cannot be written.
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


def _load_card(path: Path) -> ModelCard:
    import yaml  # comes with huggingface_hub, which reads the metadata with it
    from huggingface_hub import ModelCard

    if not path.is_file():
        raise SourceError(f"{path.parent} has no {CARD}.", "Give a folder that hisvd wrote.")
    try:
        return ModelCard(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise SourceError(
            f"The metadata of {path} is damaged: {reason(error)}",
            "Fix the block between its first two lines of dashes.",
        ) from error


def _model_name(folder: Path) -> str:
    record = read_provenance(folder)
    return f"{slug(record['model']['name'])}-{record['ratio']:g}"


def read_provenance(folder: Path) -> dict[str, Any]:
    path = folder / PROVENANCE
    try:
        record = read_json(path)
        known = {key: record[key] for key in ("model", "ratio", "decomposer", "calibration")}
        return {**known, **{key: record.get(key) for key in ("update", "stages", "recovery")}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path} is missing or damaged.", "Compress again.") from error


def _key(result: EvalResult) -> tuple[object, ...]:
    """Return what tells a result from others: all but its value and the dense model's."""
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
    """Return five significant figures: more differ between machines."""
    return float(f"{value:.5g}")


def _table(results: Sequence[EvalResult]) -> str:
    lines = ["| dataset | metric | before | this model | how |", "|---|---|---|---|---|"]
    for result in results:
        details = dict(result.metric_args or {})
        dense = details.pop(_DENSE, "not measured")
        digest = details.pop("text_sha256", None)
        how = ", ".join(f"{name} {value}" for name, value in details.items())
        how += f", text {str(digest)[:12]}" if digest else ""
        split = f" ({result.dataset_split})" if result.dataset_split else ""
        cells = (f"{result.dataset_name}{split}", result.metric_type, dense, result.metric_value)
        lines.append(f"| {' | '.join(map(markdown_text, (*cells, how)))} |")
    return "\n".join(lines)


def _with_table(text: str, table: str) -> str:
    """Put the table between its two marks, or behind a text whose marks were removed."""
    block = f"{BEGIN}\n{table}\n{END}"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        return f"{before}{block}{after}"
    return f"{text.rstrip()}\n\n## What it costs\n\n{block}\n"
