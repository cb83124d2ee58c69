"""Settings of the model and of calibration."""

from __future__ import annotations

from typing import Literal

from hisvd_cli.pipelines.config.settings.fields import LARGEST_SEED, Memory, Section, setting
from hisvd_cli.utils.registry import MANY


class ModelSettings(Section):
    """``[model]``: the model, its device and its memory."""

    name: str = setting(
        "",
        "Hub id, local folder, .gguf file, or 'demo', a small model shipped with hisvd.",
        "--model",
        basic=True,
    )
    revision: str | None = setting(None, "Branch, tag or commit on the Hub.")
    trust_remote_code: bool = setting(
        False,
        "Run the Python code that comes with the model.",
        consent="runs the Python code that a model ships",
    )
    device: str = setting(
        "auto", "cpu, cuda, cuda:1 or mps; auto uses a GPU if there is one.", basic=True
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "Precision of forward passes: float32, bfloat16 or float16; auto uses the dtype of the "
        "weights unless float32 is faster on this device.",
    )
    max_memory: Memory | None = setting(
        None,
        "Memory limit: 3GB (host), or cpu=8GB,cuda=20GB. If needed, hidden states move to host "
        "memory or disk, and fewer windows are processed at a time.",
        metavar="SIZE",
        decides=False,
        basic=True,
    )
    scratch: str | None = setting(
        None,
        "Folder for temporary files, large enough for a model; default: in the cache.",
        metavar="PATH",
        decides=False,
    )


class CalibrationSettings(Section):
    """``[calibration]``: the text for activation statistics."""

    dataset: str = setting(
        "auto",
        "Calibration text: wikitext2, c4, ptb, demo, self (text sampled from the model), a Hub "
        "id, or a .txt .jsonl .json .parquet file; auto is wikitext2, or demo for the demo "
        "model.",
        basic=True,
    )
    drop: str = setting(
        "",
        "String to remove from the text, with the space before it, such as '<unk>'.",
        metavar="TEXT",
    )
    samples: int | None = setting(
        None,
        "Calibration windows; default 256, or 64 for the demo text.",
        ge=1,
        le=MANY,
        basic=True,
    )
    seqlen: int | None = setting(
        None,
        "Tokens per window; default 2048, or the model's maximum length if shorter.",
        ge=2,
        le=MANY,
    )
    seed: int = setting(0, "Random seed that selects the windows.", ge=0, le=LARGEST_SEED)
    batch: int = setting(4, "Windows per forward pass.", decides=False, ge=1, le=MANY)
    gradients: bool = setting(
        False, "Also collect gradients of the loss, for fisher and related methods.", decides=False
    )
    weight_gradients: bool = setting(
        False,
        "Also collect weight gradients, for zero-sum, fwsvd and gfwsvd; implies "
        "`calibration.gradients`.",
        decides=False,
    )
    path: str | None = setting(
        None,
        "Folder of the calibration; default: in the cache.",
        "--calibration",
        metavar="PATH",
        decides=False,
        basic=True,
    )
