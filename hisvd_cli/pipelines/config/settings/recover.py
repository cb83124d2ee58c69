"""The short training that wins back what truncation lost."""

from __future__ import annotations

from typing import Literal

from hisvd_cli.pipelines.config.settings.fields import LARGEST_SEED, MANY, Section, setting

_LORA = "Recovery by lora"


class RecoverSettings(Section):
    """``[recover]``: what is trained after truncation, on what, and for how long."""

    method: Literal["none", "distill", "lora"] = setting(
        "none",
        "Short training: distill (all factors, towards the dense model's distributions), lora "
        "(adapters of U, merged, then of V), or none.",
        "--recover",
    )
    dataset: str = setting(
        "auto",
        "Text to train on: as --dataset, or instructions (instruction, output and perhaps input, "
        "of which only outputs count); auto is the text of the calibration, all of it.",
        "--recover-dataset",
    )
    drop: str | None = setting(
        None,
        "Leave this out wherever it stands in the text; by default what the calibration left out.",
        "--recover-drop",
    )
    samples: int | None = setting(
        None, "Windows of it; by default all, and 256 of self.", "--recover-samples", ge=2, le=MANY
    )
    minutes: float | None = setting(
        None, "Train so long; by default 20 for distill.", "--recover-minutes", gt=0, le=1e6
    )
    tokens: int | None = setting(
        None,
        "Train on so many tokens, or as many as --recover-minutes allows if fewer; a result by "
        "tokens alone can be made again to the byte.",
        "--recover-tokens",
        ge=1,
        le=10**15,
    )
    learning_rate: float | None = setting(
        None,
        "Peak of the learning rate; by default 3e-4 for distill, 1e-4 for lora.",
        "--recover-learning-rate",
        gt=0,
        le=1e3,
    )
    temperature: float = setting(
        1.0, "distill: temperature of both distributions.", "--recover-temperature", gt=0, le=1e6
    )
    batch: int | None = setting(
        None,
        "Windows of a step; by default 4 for distill, 64 for lora.",
        "--recover-batch",
        ge=1,
        le=MANY,
    )
    seqlen: int = setting(256, "Tokens per window.", "--recover-seqlen", ge=2, le=MANY)
    seed: int = setting(
        0, "Order of the windows, and dropout.", "--recover-seed", ge=0, le=LARGEST_SEED
    )
    checkpointing: bool = setting(
        False,
        "Make activations again in the backward pass: less memory, a third more time.",
        "--recover-checkpointing",
    )
    lora_rank: int = setting(8, "Rank of the adapters.", panel=_LORA, ge=1, le=MANY)
    lora_alpha: int = setting(
        16, "Adapters are scaled by this over their rank.", panel=_LORA, ge=1, le=MANY
    )
    lora_dropout: float = setting(0.05, "Dropout before the adapters.", panel=_LORA, ge=0, lt=1)
    lora_epochs: float = setting(
        2.0,
        "Passes over the text, for U's and again for V's, without another budget.",
        panel=_LORA,
        gt=0,
        le=1e6,
    )
