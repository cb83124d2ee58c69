"""How quality and speed are measured."""

from __future__ import annotations

from typing import Literal

from hisvd_cli.pipelines.config.settings.fields import MANY, Counts, Names, Section, Words, setting

_TASKS = "Tasks (lm-eval)"
_EFFICIENCY = "Efficiency"


class EvalSettings(Section):
    """``[eval]``: how quality is measured."""

    dataset: Names = setting(
        [],
        "Text, as for calibrate; by default wikitext2's test split, and demo for the demo model.",
    )
    seqlen: int | None = setting(
        None,
        "Tokens per window; by default 2048, or the model's positions if fewer.",
        ge=2,
        le=MANY,
    )
    windows: int = setting(
        0, "Only the first so many windows of the text; 0 takes all.", ge=0, le=MANY
    )
    batch: int = setting(1, "Windows per forward pass.", ge=1, le=MANY)
    baseline: str | None = setting(
        None, "Model to hold the others against, named as for --model: adds KL and agreement."
    )
    stream: Literal["auto", "on", "off"] = setting(
        "auto",
        "Hold one block of a model in memory at a time: on, off, or auto: where its weights do not "
        "fit. The numbers are the same.",
    )
    tasks: Words = setting(
        [],
        "Tasks that lm-eval runs, with commas between: arc_easy,piqa. Needs the extra: pip install "
        "'hisvd[eval]'.",
        panel=_TASKS,
    )
    num_fewshot: int | None = setting(
        None,
        "Examples in front of each question; by default as the task says.",
        panel=_TASKS,
        ge=0,
        le=MANY,
    )
    limit: int | None = setting(
        None, "Only the first so many questions of each task.", panel=_TASKS, ge=1, le=MANY
    )
    task_path: str | None = setting(
        None,
        "Folder of tasks of your own, in lm-eval's YAML; runs the Python code that they name.",
        panel=_TASKS,
        consent="runs the Python code that task files name",
    )
    efficiency: bool = setting(
        False,
        "Also time prefill and decode, in turns with the baseline.",
        panel=_EFFICIENCY,
    )
    batch_sizes: Counts = setting(
        [1, 8, 32], "Sequences that are timed together.", panel=_EFFICIENCY
    )
    prompt_tokens: int | None = setting(
        None,
        "Tokens of each prompt; by default 512, or what the model has positions for if fewer.",
        panel=_EFFICIENCY,
        ge=1,
        le=MANY,
    )
    new_tokens: int = setting(
        64, "Tokens that are made after it.", panel=_EFFICIENCY, ge=1, le=MANY
    )
    turns: int = setting(
        5, "Turns that are timed, after one that is not.", panel=_EFFICIENCY, ge=1, le=10_000
    )
    compile: bool = setting(False, "Time what torch.compile makes.", panel=_EFFICIENCY)
