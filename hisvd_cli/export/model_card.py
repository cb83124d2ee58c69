"""Writes the Hugging Face model card (``README.md``) of a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hisvd_cli.allocation.plan import Plan, load_plan
from hisvd_cli.export.card_results import BEGIN, END, TASK, read_provenance
from hisvd_cli.inspection.audit import recovery_text, stages_text
from hisvd_cli.modeling.layers.shapes import is_stack
from hisvd_cli.modeling.sources.companions import CARD, card_metadata, licences
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.utils.escaping import markdown_code, markdown_text
from hisvd_cli.utils.files.atomic import write_text
from hisvd_cli.utils.quantities import counted

_PLAN = "plan.json"
_CARRIED = ("license", "license_name", "license_link", "language")
_UNMEASURED = "Not measured yet."

_BODY = """
# {name} at keep ratio {kept:g}

{what}

| | |
|---|---|
| parameters kept, compressible layers | {kept_exact:.2%} |
| parameters kept, whole model | {model_kept:.2%} |{active}
| low-rank layers | {low_rank} of {sublayers}, {storage} |{integers}
| rank allocation | {allocator} |
| decomposition | {decomposer} |{stages}
| calibration | {calibration} |

## Evaluation

{results}

## Usage

{loading}

All settings are recorded in `hisvd.json`{and_plan}.
"""
_LOW_RANK = """\
{model}, compressed with hisvd: the linear layers of its decoder blocks are replaced by
low-rank factors, {training}."""
_LOADING = """\
With hisvd installed (`pip install hisvd`):

```python
import hisvd_cli
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```

Without hisvd, using the code in this folder:

```python
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
```"""
_CODE_LOADING = """\
With hisvd installed (`pip install hisvd`), using the base model's code in this folder:

```python
import hisvd_cli
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
```"""
_MULTIPLIED = """\
{model}, compressed with hisvd: the linear layers of its decoder blocks are truncated to
low rank, {training}, and converted back to dense weights of the original size."""
_PLAIN_LOADING = """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```"""


def write_card(folder: Path, source: Source, plan: Plan, record: Mapping[str, Any]) -> None:
    """Write the model card of a checkpoint from its plan and its provenance record.

    The licence is taken from the card or the licence file of the source.
    """
    metadata: dict[str, Any] = dict(_licence(source.folder))
    if "/" in source.name and source.revision:
        metadata["base_model"] = source.name
    _write(folder, metadata, plan, record, multiplied=False, carries_code=source.carries_code)


def rewrite_card(checkpoint: Path, folder: Path, record: Mapping[str, Any]) -> None:
    """Write the card of a checkpoint that was derived from another one.

    It contains no results, because none were measured yet. Without a plan, no card is written.

    Args:
        checkpoint: folder of the original checkpoint.
        folder: folder of the new one.
        record: provenance of the new one.

    Raises:
        SourceError: a file of the checkpoint is damaged.
    """
    _write_anew(checkpoint, folder, record, multiplied=False)


def write_dense_card(checkpoint: Path, folder: Path) -> None:
    """Write the card of the dense model that a checkpoint was converted to.

    It contains no results, because none were measured yet. Without a plan, no card is written.

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
    _write(folder, metadata, plan, record or read_provenance(checkpoint), multiplied=multiplied)


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
        pipeline_tag=TASK,
        tags=["hisvd", "low-rank", "compression"],
    )
    body = _body(plan, record, multiplied, carries_code)
    write_text(folder / CARD, f"---\n{data.to_yaml()}\n---\n{body}")


def _body(plan: Plan, record: Mapping[str, Any], multiplied: bool, carries_code: bool) -> str:
    named = record["model"]["name"]
    # Local paths are private: only the last part is published.
    model = Path(named).name if Path(named).exists() or Path(named).is_absolute() else named
    integers: Mapping[str, Any] = record.get("quantization", {})
    pairs = {"pair": "stored as plain factors", "pivoted": "stored as pivoted factors"}[
        integers.get("storage", plan.storage)
    ]
    if plan.storage == "pivoted" and any(is_stack(s.shape) for s in plan.sublayers):
        pairs += ", experts as plain factors"
    tuned = recovery_text(record)
    return _BODY.format(
        name=markdown_text(Path(named).name),
        what=(_MULTIPLIED if multiplied else _LOW_RANK).format(
            model=markdown_code(model),
            training=f"then fine-tuned ({markdown_text(tuned)})" if tuned else "without training",
        ),
        kept=plan.ratio,
        kept_exact=plan.kept_ratio,
        model_kept=plan.model_ratio,
        active="" if multiplied else _active(plan),
        low_rank=len(plan.ranks),
        sublayers=len(plan.sublayers),
        storage="converted to dense weights" if multiplied else pairs,
        integers="" if multiplied else _integers(integers, plan),
        allocator=markdown_text(plan.allocator),
        decomposer=markdown_text(record["decomposer"] + _updated(record.get("update"))),
        stages=f"\n| stages | {markdown_text(stages)} |" if (stages := stages_text(record)) else "",
        calibration=markdown_text(_calibration(record["calibration"])),
        results=f"{BEGIN}\n{_UNMEASURED}\n{END}",
        loading=_PLAIN_LOADING if multiplied else _CODE_LOADING if carries_code else _LOADING,
        and_plan="" if multiplied else ", the rank of every layer in `plan.json`",
    )


def _active(plan: Plan) -> str:
    """Return the table row about the experts that a token passes; empty without experts."""
    if plan.active_parameters is None:
        return ""
    dense, kept = plan.active_parameters
    return f"\n| parameters kept, active per token | {kept / dense:.2%} ({kept:,} of {dense:,}) |"


def _licence(folder: Path) -> dict[str, Any]:
    """Return licence and language from a model's card; without a licence there, the licence file
    is referenced instead."""
    known = card_metadata(folder)
    carried = {key: known[key] for key in _CARRIED if known.get(key)}
    files = licences(folder)
    if "license" not in carried and files:
        carried |= {"license": "other", "license_name": "see-file", "license_link": files[0]}
    return carried


def _integers(made: Mapping[str, Any], plan: Plan) -> str:
    """Return the table rows about quantization; empty if nothing is quantized."""
    if not made:
        return ""
    counts = Counter(made["bits"].values())
    kinds = ", ".join(
        f"int{bits} in {counted(count, 'layer')}" for bits, count in sorted(counts.items())
    )
    groups = f", groups of {made['group_size']}" if 4 in counts else ""
    size, before = made["bytes"], made["dense_bytes"]
    share = f"{size / 1e6:,.1f} MB, {size / before:.2%} of {before / 1e6:,.1f} MB"
    experts = any(is_stack(s.shape) for s in plan.sublayers)
    left = "; experts are not quantized" if experts else ""
    text = markdown_text(f"{kinds}{groups}; method {made['method']}{left}")
    return f"\n| quantization | {text} |\n| size of all weights | {share} |"


def _updated(update: Mapping[str, Any] | None) -> str:
    """Describe the update of sublayers to the compressed model's inputs; empty without one."""
    if update is None:
        return ""
    return f", updated ({update['method']}) on {update['samples']} × {update['seqlen']} tokens"


def _calibration(manifest: Mapping[str, Any] | None) -> str:
    if manifest is None:
        return "none (weights only)"
    data = manifest["data"]
    name = Path(data["dataset"]).name
    return f"{data['samples']} × {data['seqlen']} tokens of {name} (seed {data['seed']})"
