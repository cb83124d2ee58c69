"""Every setting, once: its default, its bounds, and what ``--help`` says of it.

A field of a section is a key of ``hisvd.toml``, a flag, and an environment variable
``HISVD_<SECTION>_<KEY>``.
"""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _as_list(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


def _setting(default: Any, text: str, flag: str | None = None, **bounds: Any) -> Any:
    """Return a field; ``flag`` is its flag where that is not the key's name."""
    extra: dict[str, Any] | None = {"flag": flag} if flag else None
    return Field(default, description=text, json_schema_extra=extra, **bounds)


Ratio = Annotated[float, Field(gt=0, le=1)]
Ratios = Annotated[list[Ratio], Field(min_length=1), BeforeValidator(_as_list)]
Names = Annotated[list[str], BeforeValidator(_as_list)]


class Section(BaseModel):
    """A table of the profile; a key that it does not name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSettings(Section):
    """``[model]``: what is worked on, and where."""

    name: str = _setting(
        "", "Hub id, folder, .gguf file, or 'demo', a small model inside hisvd.", "--model"
    )
    revision: str | None = _setting(None, "Branch, tag or commit on the hub.")
    trust_remote_code: bool = _setting(False, "Run the Python code that a model ships.")
    device: str = _setting("auto", "cpu, cuda, cuda:1 or mps; auto takes the GPU if there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "auto",
        "Precision of forward passes: float32, bfloat16 or float16; auto is that of the weights.",
    )


class CalibrationSettings(Section):
    """``[calibration]``: the text that statistics are taken from."""

    dataset: str = _setting(
        "auto",
        "wikitext2, c4, ptb, demo, a hub id, or a .txt .jsonl .json .parquet file; auto is "
        "wikitext2, and demo for the demo model.",
    )
    samples: int = _setting(256, "Windows of text.", ge=1)
    seqlen: int | None = _setting(
        None, "Tokens per window; by default 2048, or the model's positions if fewer.", ge=2
    )
    seed: int = _setting(0, "Which windows are drawn.", ge=0)
    batch: int = _setting(4, "Windows per forward pass.", ge=1)
    path: str | None = _setting(
        None, "Folder of the calibration; by default one in the cache.", "--calibration"
    )


class PlanSettings(Section):
    """``[plan]``: how ranks are chosen."""

    ratio: Ratios = _setting([0.8], "Share of the parameters to KEEP: 0.6 keeps 60 %.")
    ratio_of: Literal["sublayers", "model"] = _setting(
        "sublayers", "What the ratio counts: the factored sublayers, or the whole model."
    )
    allocator: str = _setting("hisvd", "Method that shares the budget: hisvd or uniform.")
    rank_method: Literal["stable", "effective", "mathematical"] = _setting(
        "stable", "Rank measure of stage 1: stable, effective or mathematical."
    )
    alpha: float = _setting(0.5, "Exponent of the rank density in stage 1.", ge=0, le=8)
    spectrum: Literal["whitened", "weight"] = _setting(
        "weight", "Spectrum that stage 1 measures: whitened or weight."
    )
    modulation: Literal["logarithmic", "power", "exponential", "linear"] = _setting(
        "logarithmic", "Form of stage 2's factor: logarithmic, power, exponential or linear."
    )
    lwe_strength: float = _setting(
        2.0, "Strength β of stage 2; 0 leaves stage 1 as it is.", ge=0, le=100
    )
    tail_redundancy_weight: float = _setting(
        30.0, "Weight of the tail share in stage 2.", ge=0, le=100
    )
    min_rank_ratio: float = _setting(
        0.3, "Smallest rank, as a share of what equal shares would give.", ge=0, lt=1
    )
    multiple_of: int = _setting(1, "Ranks are multiples of this.", ge=1)
    include: Names = _setting([], "Only sublayers that match this glob of a name or type.")
    exclude: Names = _setting([], "No sublayers that match; they stay dense and uncounted.")


class CompressSettings(Section):
    """``[compress]``: how sublayers are factored, and what is written."""

    decomposer: str = _setting("whitened", "Method that factors a sublayer: whitened.")
    max_shard_size: float = _setting(5.0, "Largest weight file in GB.", gt=0)
    evaluate: bool | None = _setting(
        None, "Measure perplexity before and after; by default only for the demo model."
    )


class EvalSettings(Section):
    """``[eval]``: how quality is measured."""

    dataset: Names = _setting(
        [],
        "Text, as for calibrate; by default wikitext2's test split, and demo for the demo model.",
    )
    seqlen: int | None = _setting(
        None, "Tokens per window; by default 2048, or the model's positions if fewer.", ge=2
    )
    windows: int = _setting(0, "Only the first so many windows of the text; 0 takes all.", ge=0)
    batch: int = _setting(1, "Windows per forward pass.", ge=1)
    baseline: str | None = _setting(None, "Model to measure beside it, named as for --model.")


class Settings(Section):
    """The whole profile."""

    model: ModelSettings = ModelSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    plan: PlanSettings = PlanSettings()
    compress: CompressSettings = CompressSettings()
    eval: EvalSettings = EvalSettings()


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSettings,
    "calibration": CalibrationSettings,
    "plan": PlanSettings,
    "compress": CompressSettings,
    "eval": EvalSettings,
}


def flag_of(section: str, key: str) -> str:
    """Return the flag of a setting, such as ``--rank-method``."""
    extra = SECTIONS[section].model_fields[key].json_schema_extra
    if isinstance(extra, dict) and "flag" in extra:
        return str(extra["flag"])
    return f"--{key.replace('_', '-')}"


def kind_of(section: str, key: str) -> Any:
    """Return a setting's plain type: without bounds, and without the None of an unset one."""
    return _plain(SECTIONS[section].model_fields[key].annotation)


def _plain(annotation: Any) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _plain(arguments[0])
    if origin in (types.UnionType, typing.Union):
        return next(_plain(a) for a in arguments if a is not type(None))
    if origin is list:
        return list[_plain(arguments[0])]  # type: ignore[misc]
    return annotation
