"""The settings of each function as typed keywords, for editors and type checkers.

``tests/test_api.py`` checks that they match the settings, which define defaults and bounds.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import torch
from typing_extensions import TypedDict

from hisvd_cli.pipelines.config.settings import PresetName

PathText = str | os.PathLike[str]
DeviceName = str | torch.device
DtypeName = Literal["auto", "float32", "bfloat16", "float16"] | torch.dtype


class LoadKeywords(TypedDict, total=False):
    """Settings of ``load``."""

    revision: str | None
    trust_remote_code: bool
    device: DeviceName
    dtype: DtypeName
    scratch: PathText | None


class ModelKeywords(LoadKeywords, total=False):
    """``[model]``, without its name."""

    max_memory: str | None


class CalibrateKeywords(ModelKeywords, total=False):
    """Settings of ``calibrate``."""

    dataset: PathText
    drop: str
    samples: int | None
    seqlen: int | None
    seed: int
    batch: int
    gradients: bool
    weight_gradients: bool
    calibration: PathText | None


class _PlanKeywords(TypedDict, total=False):
    """``[plan]``."""

    ratio: float
    ratio_of: Literal["sublayers", "model"]
    bytes_ratio: float | None
    preset: PresetName | None
    allocator: str
    metric: Literal["whitened", "fisher", "held-out", "weight"]
    input_shrinkage: float
    output_shrinkage: float
    min_rank_ratio: float
    multiple_of: int
    storage: Literal["pair", "pivoted"]
    include: str | Sequence[str]
    exclude: str | Sequence[str]
    rank_method: Literal["stable", "effective", "mathematical"]
    alpha: float
    spectrum: Literal["whitened", "weight"]
    modulation: Literal["logarithmic", "power", "exponential", "linear"]
    lwe_strength: float
    tail_redundancy_weight: float
    selection: Literal["zero-sum", "smallest", "negative-sum", "sigma", "loss-order"]
    importance_weight: float
    sensitivity_ratios: float | Sequence[float]
    probe_ratio: float
    depth_factor: float
    probe_samples: int
    learning_start: Literal["uniform", "waterfill"]
    learning_steps: int
    learning_rate: float
    softness: float


class PlanKeywords(_PlanKeywords, CalibrateKeywords, total=False):
    """Settings of ``plan``."""

    quantize_method: Literal["nearest", "gptq"]
    group_size: int


class _QuantizeKeywords(TypedDict, total=False):
    """``[quantize]``."""

    quantize: Literal["none", "int8", "int4"]
    quantize_method: Literal["nearest", "gptq"]
    quantize_dense: Literal["int8", "same"]
    group_size: int
    damping: float


class _CompressKeywords(TypedDict, total=False):
    """``[compress]`` and ``[recover]``."""

    decomposer: str
    solver: Literal["auto", "eigh", "svd", "partial", "subspace"]
    update: Literal["none", "closed-form", "propagated"]
    update_damping: float | None
    max_shard_size: float
    evaluate: bool | None
    stages: int
    correction: Literal["pull-subspace", "project-to-delta", "alpha-blend", "gradient-step"]
    correction_samples: int
    correction_batches: int
    correction_alpha: float
    correction_step: float
    asvd_alpha: float
    weighting: Literal["svd", "asvd", "whitened", "fwsvd", "gfwsvd", "fisher"]
    oversamples: int
    power_iterations: int
    recover: Literal["none", "distill", "lora"]
    recover_dataset: PathText
    recover_drop: str | None
    recover_samples: int | None
    recover_minutes: float | None
    recover_tokens: int | None
    recover_learning_rate: float | None
    recover_temperature: float
    recover_batch: int | None
    recover_seqlen: int
    recover_seed: int
    recover_checkpointing: bool
    lora_rank: int
    lora_alpha: int
    lora_dropout: float
    lora_epochs: float


class CompressKeywords(
    _PlanKeywords, _CompressKeywords, _QuantizeKeywords, CalibrateKeywords, total=False
):
    """Settings of ``compress``."""

    model: PathText
    windows: int


class EvaluateKeywords(ModelKeywords, total=False):
    """Settings of ``evaluate``."""

    dataset: PathText | Sequence[PathText]
    seqlen: int | None
    windows: int
    batch: int
    baseline: PathText | None
    stream: Literal["auto", "on", "off"]
    tasks: str | Sequence[str]
    num_fewshot: int | None
    limit: int | None
    task_path: PathText | None
    efficiency: bool
    batch_sizes: int | Sequence[int]
    prompt_tokens: int | None
    new_tokens: int
    turns: int
    compile: bool


class InspectKeywords(TypedDict, total=False):
    """Settings of ``inspect``."""

    revision: str | None
    trust_remote_code: bool


class ConvertKeywords(_QuantizeKeywords, total=False):
    """Settings of ``convert``."""

    max_shard_size: float
    dataset: PathText
    samples: int | None
    seqlen: int | None
    seed: int
    batch: int
    device: DeviceName
    dtype: DtypeName
    scratch: PathText | None
