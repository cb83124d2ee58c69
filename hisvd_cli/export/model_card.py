"""``README.md`` of a checkpoint: a Hugging Face model card that says what it is, how to load it,
what was kept, and what that cost where it was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hisvd_cli.allocation.plan import Plan, load_plan
from hisvd_cli.calibration.text.datasets import NAMED
from hisvd_cli.inspection.audit import stages_text, told_recovery
from hisvd_cli.modeling.checkpoints.folder_record import PROVENANCE, content_hash, renew_record
from hisvd_cli.modeling.sources.companions import CARD, card_metadata, licences
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.utils.errors import SourceError
from hisvd_cli.utils.escaping import markdown_code, markdown_text
from hisvd_cli.utils.files.fingerprints import slug
from hisvd_cli.utils.files.json_files import read_json
from hisvd_cli.utils.files.tensorfile import reason, write_text

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData


_PLAN = "plan.json"
_TASK = "text-generation"
_CARRIED = ("license", "license_name", "license_link", "language")
_BEGIN = "<!-- hisvd: results, written again by every evaluation -->"
_END = "<!-- hisvd: end of results -->"
_UNMEASURED = "Not measured yet."
_NOT_FINITE = "not finite"
_DENSE = "dense"

_BODY = """
# {name}, {kept:.0%} kept

{what}

| | |
|---|---|
| kept of the compressible sublayers | {kept_exact:.2%} |
| kept of the whole model | {model_kept:.2%} |
| low-rank sublayers | {low_rank} of {sublayers}, {storage} |{integers}
| rank allocation | {allocator} |
| decomposition | {decomposer} |{stages}
| calibration | {calibration} |

## What it costs

{results}

## Load it

{loading}

Every setting stands in `hisvd.json`{and_plan}.
"""
_LOW_RANK = """\
The linear layers of the decoder blocks of {model} replaced by low-rank pairs with
hisvd, {training}."""
_LOADING = """\
With hisvd installed (`pip install hisvd`):

```python
import hisvd_cli
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```

Without hisvd, with the code in this folder:

```python
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
```"""
_CODE_LOADING = """\
With hisvd installed (`pip install hisvd`), and the code of the base model in this folder:

```python
import hisvd_cli
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
```"""
_MULTIPLIED = """\
The linear layers of the decoder blocks of {model} truncated to low rank with
hisvd, {training}, and multiplied out again: a plain model
of the original size."""
_PLAIN_LOADING = """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```"""


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


def write_card(folder: Path, source: Source, plan: Plan, record: Mapping[str, Any]) -> None:
    """Write the model card of a checkpoint from its plan and its provenance record.

    The licence is that of the source, as its own card or licence file says.
    """
    metadata: dict[str, Any] = dict(_licence(source.folder))
    if "/" in source.name and source.revision:
        metadata["base_model"] = source.name
    _write(folder, metadata, plan, record, multiplied=False, carries_code=source.carries_code)


def rewrite_card(checkpoint: Path, folder: Path, record: Mapping[str, Any]) -> None:
    """Write the card of a checkpoint that was made from another one, with its provenance record.

    It claims no results: none were measured of it. Without a plan there is no card.

    Raises:
        SourceError: a file of the checkpoint is damaged.
    """
    _write_anew(checkpoint, folder, record, multiplied=False)


def write_dense_card(checkpoint: Path, folder: Path) -> None:
    """Write the card of the dense model that a checkpoint was multiplied out to.

    It claims no results: none were measured of that model. Without a plan there is no card.

    Raises:
        SourceError: a file of the checkpoint is damaged.
    """
    _write_anew(checkpoint, folder, None, multiplied=True)


def _write_anew(
    checkpoint: Path, folder: Path, record: Mapping[str, Any] | None, *, multiplied: bool
) -> None:
    if not (checkpoint / _PLAN).is_file():
        return
    known = card_metadata(checkpoint)
    metadata = {key: known[key] for key in (*_CARRIED, "base_model") if key in known}
    plan = load_plan(checkpoint / _PLAN)
    _write(folder, metadata, plan, record or _record(checkpoint), multiplied=multiplied)


def _write(
    folder: Path,
    metadata: Mapping[str, Any],
    plan: Plan,
    record: Mapping[str, Any],
    *,
    multiplied: bool,
    carries_code: bool = False,
) -> None:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        **metadata,
        library_name="transformers",
        pipeline_tag=_TASK,
        tags=["hisvd", "low-rank", "compression"],
    )
    named = record["model"]["name"]
    # A path says where the model lay on one machine, which is nobody's business.
    model = Path(named).name if Path(named).exists() or Path(named).is_absolute() else named
    integers: Mapping[str, Any] = record.get("quantization", {})
    pairs = {"pair": "stored as plain pairs", "pivoted": "stored as pivoted pairs"}[
        integers.get("storage", plan.storage)
    ]
    trained = told_recovery(record)
    body = _BODY.format(
        name=markdown_text(Path(named).name),
        what=(_MULTIPLIED if multiplied else _LOW_RANK).format(
            model=markdown_code(model),
            training=f"then trained ({markdown_text(trained)})" if trained else "without training",
        ),
        kept=plan.ratio,
        kept_exact=plan.kept_ratio,
        model_kept=plan.model_ratio,
        low_rank=len(plan.ranks),
        sublayers=len(plan.sublayers),
        storage="multiplied out" if multiplied else pairs,
        integers="" if multiplied else _integers(integers),
        allocator=markdown_text(plan.allocator),
        decomposer=markdown_text(record["decomposer"] + _updated(record.get("update"))),
        stages=f"\n| stages | {markdown_text(stages)} |" if (stages := stages_text(record)) else "",
        calibration=markdown_text(_calibration(record["calibration"])),
        results=f"{_BEGIN}\n{_UNMEASURED}\n{_END}",
        loading=_PLAIN_LOADING if multiplied else _CODE_LOADING if carries_code else _LOADING,
        and_plan="" if multiplied else ", the rank of every sublayer in `plan.json`",
    )
    write_text(folder / CARD, f"---\n{data.to_yaml()}\n---\n{body}")


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
            "Mend the block between its first two lines of dashes.",
        ) from error


def _model_name(folder: Path) -> str:
    record = _record(folder)
    return f"{slug(record['model']['name'])}-{record['ratio']:g}"


def _record(folder: Path) -> dict[str, Any]:
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
        task_type=_TASK,
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
    block = f"{_BEGIN}\n{table}\n{_END}"
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if begin and end:
        return f"{before}{block}{after}"
    return f"{text.rstrip()}\n\n## What it costs\n\n{block}\n"


def _licence(folder: Path) -> dict[str, Any]:
    """Return what a model's card says of its licence and language; where it says nothing of a
    licence, its licence file stands for it."""
    known = card_metadata(folder)
    carried = {key: known[key] for key in _CARRIED if known.get(key)}
    files = licences(folder)
    if "license" not in carried and files:
        carried |= {"license": "other", "license_name": "see-file", "license_link": files[0]}
    return carried


def _integers(made: Mapping[str, Any]) -> str:
    """Return the lines that say how numbers are stored, where some are integers."""
    if not made:
        return ""
    counts = Counter(made["bits"].values())
    kinds = ", ".join(f"int{bits} in {count} sublayers" for bits, count in sorted(counts.items()))
    groups = f", groups of {made['group_size']}" if 4 in counts else ""
    size, before = made["bytes"], made["dense_bytes"]
    share = f"{size / 1e6:,.1f} MB, {size / before:.2%} of {before / 1e6:,.1f} MB"
    told = markdown_text(f"{kinds}{groups}; rounded by {made['method']}")
    return f"\n| numbers | {told} |\n| bytes of all weights | {share} |"


def _updated(update: Mapping[str, Any] | None) -> str:
    """Say how sublayers were fitted to the inputs of the compressed model, if they were."""
    if update is None:
        return ""
    return f", updated ({update['method']}) on {update['samples']} × {update['seqlen']} tokens"


def _calibration(manifest: Mapping[str, Any] | None) -> str:
    if manifest is None:
        return "none: from the weights alone"
    data = manifest["data"]
    name = Path(data["dataset"]).name
    return f"{data['samples']} × {data['seqlen']} tokens of {name} (seed {data['seed']})"
