"""``README.md`` of a checkpoint: a model card that says what it is and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hisvd_cli.plan import Plan
from hisvd_cli.source import Source
from hisvd_cli.tensorfile import write_text

_BODY = """
# {name}, {kept:.0%} kept

The linear layers of the decoder blocks of `{model}` replaced by low-rank pairs with
[hisvd](https://pypi.org/project/hisvd/), without training.

| | |
|---|---|
| kept of the compressible sublayers | {kept_exact:.2%} |
| kept of the whole model | {model_kept:.2%} |
| low-rank sublayers | {low_rank} of {sublayers}, stored as {storage} |
| rank allocation | {allocator} |
| decomposition | {decomposer} |
| calibration | {calibration} |

## Load it

With hisvd installed (`pip install hisvd`):

```python
import hisvd_cli
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```

Without hisvd, with the code in this folder:

```python
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
```

Every setting stands in `hisvd.json`, the rank of every sublayer in `plan.json`.
"""


def write_card(folder: Path, source: Source, plan: Plan, record: Mapping[str, Any]) -> None:
    """Write the model card of a checkpoint from its plan and its provenance record."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=source.name if "/" in source.name and source.revision else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hisvd", "low-rank", "compression"],
    )
    body = _BODY.format(
        name=Path(source.name).name,
        model=Path(source.name).name if Path(source.name).exists() else source.name,
        kept=plan.ratio,
        kept_exact=plan.kept_ratio,
        model_kept=plan.model_ratio,
        low_rank=len(plan.ranks),
        sublayers=len(plan.sublayers),
        storage={"pair": "plain pairs", "pivoted": "pivoted pairs"}[plan.storage],
        allocator=plan.allocator,
        decomposer=record["decomposer"],
        calibration=_calibration(record["calibration"]),
    )
    write_text(folder / "README.md", f"---\n{data.to_yaml()}\n---\n{body}")


def _calibration(manifest: Mapping[str, Any] | None) -> str:
    if manifest is None:
        return "none: from the weights alone"
    data = manifest["data"]
    name = Path(data["dataset"]).name
    return f"{data['samples']} × {data['seqlen']} tokens of {name} (seed {data['seed']})"
