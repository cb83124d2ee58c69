"""What is worked on, and the text that statistics are taken from."""

from __future__ import annotations

from typing import Literal

from hisvd_cli.pipelines.config.settings.fields import LARGEST_SEED, MANY, Memory, Section, setting


class ModelSettings(Section):
    """``[model]``: what is worked on, and where."""

    name: str = setting(
        "", "Hub id, folder, .gguf file, or 'demo', a small model inside hisvd.", "--model"
    )
    revision: str | None = setting(None, "Branch, tag or commit on the hub.")
    trust_remote_code: bool = setting(
        False,
        "Run the Python code that a model ships.",
        consent="runs the Python code that a model ships",
    )
    device: str = setting("auto", "cpu, cuda, cuda:1 or mps; auto takes the GPU if there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "Precision of forward passes: float32, bfloat16 or float16; auto is that of the weights "
        "where this device is as fast in it as in float32.",
    )
    max_memory: Memory | None = setting(
        None,
        "Memory to keep to: 3GB (of the machine), or cpu=8GB,cuda=20GB. Hidden states then go to "
        "host memory or a file, and fewer windows through a block at a time, where they must.",
        decides=False,
    )
    scratch: str | None = setting(
        None,
        "Folder for temporary files, with room for a model; by default one in the cache.",
        decides=False,
    )


class CalibrationSettings(Section):
    """``[calibration]``: the text that statistics are taken from."""

    dataset: str = setting(
        "auto",
        "wikitext2, c4, ptb, demo, self (text sampled from the model itself), a hub id, or a .txt "
        ".jsonl .json .parquet file; auto is wikitext2, and demo for the demo model.",
    )
    drop: str = setting(
        "",
        "Leave this out wherever it stands in the text, with the space before it: '<unk>' where "
        "rare words are written so.",
    )
    samples: int | None = setting(
        None, "Windows of text; by default 256, or 64 of the demo's text.", ge=1, le=MANY
    )
    seqlen: int | None = setting(
        None,
        "Tokens per window; by default 2048, or the model's positions if fewer.",
        ge=2,
        le=MANY,
    )
    seed: int = setting(0, "Which windows are drawn.", ge=0, le=LARGEST_SEED)
    batch: int = setting(4, "Windows per forward pass.", decides=False, ge=1, le=MANY)
    gradients: bool = setting(
        False, "Also take gradients of the loss, for fisher and the like.", decides=False
    )
    weight_gradients: bool = setting(
        False,
        "Also those of the weights, for zero-sum, fwsvd and gfwsvd; implies --gradients.",
        decides=False,
    )
    path: str | None = setting(
        None,
        "Folder of the calibration; by default one in the cache.",
        "--calibration",
        decides=False,
    )
