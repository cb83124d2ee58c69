"""Settings of evaluation."""

from __future__ import annotations

from typing import Literal

from hisvd_cli.pipelines.config.settings.fields import Counts, Names, Section, Words, setting
from hisvd_cli.utils.registry import MANY

_TASKS = "Tasks (lm-eval)"
_EFFICIENCY = "Efficiency"


class EvalSettings(Section):
    """``[eval]``: evaluation of quality and speed."""

    dataset: Names = setting(
        [],
        "Evaluation text, as for calibrate; default: the test split of wikitext2, or demo for "
        "the demo model.",
        basic=True,
    )
    seqlen: int | None = setting(
        None,
        "Tokens per window; default 2048, or the model's maximum length if shorter.",
        ge=2,
        le=MANY,
        basic=True,
    )
    windows: int = setting(
        0, "Number of windows to evaluate; 0 evaluates all.", ge=0, le=MANY, basic=True
    )
    batch: int = setting(1, "Windows per forward pass.", ge=1, le=MANY)
    baseline: str | None = setting(
        None,
        "Model to compare with, named as for `model.name`: adds KL divergence and agreement.",
        metavar="MODEL",
        basic=True,
    )
    stream: Literal["auto", "on", "off"] = setting(
        "auto",
        "Keep one block in memory at a time: on, off, or auto (if the weights do not fit). "
        "Results are the same.",
    )
    tasks: Words = setting(
        [],
        "lm-eval tasks, separated by commas: arc_easy,piqa. Requires pip install 'hisvd[eval]'.",
        panel=_TASKS,
        basic=True,
    )
    num_fewshot: int | None = setting(
        None,
        "Number of few-shot examples; default: as defined by the task.",
        panel=_TASKS,
        ge=0,
        le=MANY,
    )
    limit: int | None = setting(
        None, "Number of questions per task; default: all.", panel=_TASKS, ge=1, le=MANY
    )
    task_path: str | None = setting(
        None,
        "Folder with your own lm-eval task files (YAML); runs the Python code that they name.",
        panel=_TASKS,
        consent="runs the Python code that task files name",
        metavar="PATH",
    )
    efficiency: bool = setting(
        False,
        "Also measure prefill and decode speed, alternating with the baseline.",
        panel=_EFFICIENCY,
        basic=True,
    )
    batch_sizes: Counts = setting([1, 8, 32], "Batch sizes to measure.", panel=_EFFICIENCY)
    prompt_tokens: int | None = setting(
        None,
        "Prompt length; default 512, or the model's maximum length if shorter.",
        panel=_EFFICIENCY,
        ge=1,
        le=MANY,
    )
    new_tokens: int = setting(64, "Number of generated tokens.", panel=_EFFICIENCY, ge=1, le=MANY)
    turns: int = setting(
        5, "Timed repetitions, after one warm-up.", panel=_EFFICIENCY, ge=1, le=10_000
    )
    compile: bool = setting(False, "Measure the model under torch.compile.", panel=_EFFICIENCY)
