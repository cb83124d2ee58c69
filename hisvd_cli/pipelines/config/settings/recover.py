"""Settings of fine-tuning after compression."""

from __future__ import annotations

from typing import Literal

from hisvd_cli.pipelines.config.settings.fields import LARGEST_SEED, Section, setting
from hisvd_cli.utils.registry import MANY

_LORA = "Recovery with LoRA"


class RecoverSettings(Section):
    """``[recover]``: fine-tuning after compression."""

    method: Literal["none", "distill", "lora"] = setting(
        "none",
        "Recover accuracy by fine-tuning: distill (all factors, towards the output distribution "
        "of the dense model), lora (adapters on U, then on V, each merged), or none.",
        "--recover",
        basic=True,
    )
    dataset: str = setting(
        "auto",
        "Training text: as for `calibration.dataset`, or instruction data (instruction, output and "
        "optional input; only outputs are trained on); auto is the whole calibration text.",
        "--recover-dataset",
    )
    drop: str | None = setting(
        None,
        "String to remove from the text; default: the same as for calibration.",
        "--recover-drop",
        metavar="TEXT",
    )
    samples: int | None = setting(
        None, "Training windows; default: all, or 256 for self.", "--recover-samples", ge=2, le=MANY
    )
    minutes: float | None = setting(
        None,
        "Time limit for training, in minutes; default 20 for distill.",
        "--recover-minutes",
        gt=0,
        le=1e6,
    )
    tokens: int | None = setting(
        None,
        "Number of training tokens, within `recover.minutes`; without a time limit "
        "the result is reproducible to the byte.",
        "--recover-tokens",
        ge=1,
        le=10**15,
    )
    learning_rate: float | None = setting(
        None,
        "Peak learning rate; default 3e-4 for distill, 1e-4 for lora.",
        "--recover-learning-rate",
        gt=0,
        le=1e3,
    )
    temperature: float = setting(
        1.0, "distill: temperature of both distributions.", "--recover-temperature", gt=0, le=1e6
    )
    batch: int | None = setting(
        None,
        "Windows per step; default 4 for distill, 64 for lora.",
        "--recover-batch",
        ge=1,
        le=MANY,
    )
    seqlen: int = setting(256, "Tokens per window.", "--recover-seqlen", ge=2, le=MANY)
    seed: int = setting(
        0, "Random seed of window order and dropout.", "--recover-seed", ge=0, le=LARGEST_SEED
    )
    checkpointing: bool = setting(
        False,
        "Activation checkpointing: less memory, about a third more time.",
        "--recover-checkpointing",
    )
    lora_rank: int = setting(8, "Rank of the adapters.", panel=_LORA, ge=1, le=MANY)
    lora_alpha: int = setting(
        16, "Scale of the adapters, divided by their rank.", panel=_LORA, ge=1, le=MANY
    )
    lora_dropout: float = setting(
        0.05, "Dropout in front of the adapters.", panel=_LORA, ge=0, lt=1
    )
    lora_epochs: float = setting(
        2.0,
        "Epochs for U and again for V, unless limited otherwise.",
        panel=_LORA,
        gt=0,
        le=1e6,
    )
