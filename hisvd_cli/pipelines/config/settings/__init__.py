"""Every setting, once: its default, its bounds, and what ``--help`` says of it.

A field of a section is a key of ``hisvd.toml``, a flag, and an environment variable
``HISVD_<SECTION>_<KEY>``. A section has a file of its own.
"""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from hisvd_cli.pipelines.config.settings.compress import CompressSettings
from hisvd_cli.pipelines.config.settings.evaluation import EvalSettings
from hisvd_cli.pipelines.config.settings.fields import (
    ALLOCATOR_NAMES,
    DECOMPOSER_NAMES,
    PresetName,
    Section,
)
from hisvd_cli.pipelines.config.settings.model import CalibrationSettings, ModelSettings
from hisvd_cli.pipelines.config.settings.plan import PlanSettings
from hisvd_cli.pipelines.config.settings.quantize import QuantizeSettings
from hisvd_cli.pipelines.config.settings.recover import RecoverSettings

__all__ = [
    "ALLOCATOR_NAMES",
    "DECOMPOSER_NAMES",
    "SECTIONS",
    "CalibrationSettings",
    "CompressSettings",
    "EvalSettings",
    "ModelSettings",
    "PlanSettings",
    "PresetName",
    "QuantizeSettings",
    "RecoverSettings",
    "Section",
    "Settings",
    "choices_of",
    "consent_of",
    "decides",
    "flag_of",
    "is_basic",
    "item_of",
    "kind_of",
    "panel_of",
]


class Settings(Section):
    """The whole profile."""

    model: ModelSettings = ModelSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    plan: PlanSettings = PlanSettings()
    compress: CompressSettings = CompressSettings()
    recover: RecoverSettings = RecoverSettings()
    quantize: QuantizeSettings = QuantizeSettings()
    eval: EvalSettings = EvalSettings()


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSettings,
    "calibration": CalibrationSettings,
    "plan": PlanSettings,
    "compress": CompressSettings,
    "recover": RecoverSettings,
    "quantize": QuantizeSettings,
    "eval": EvalSettings,
}


def flag_of(section: str, key: str) -> str:
    """Return the flag of a setting, such as ``--rank-method``."""
    return str(_extra(section, key)["flag"]) or f"--{key.replace('_', '-')}"


def panel_of(section: str, key: str) -> str:
    """Return the panel of a setting in ``--help``, empty where it is that of its section."""
    return str(_extra(section, key)["panel"])


def consent_of(section: str, key: str) -> str:
    """Return what a setting does that somebody must ask for, empty where it does no such thing."""
    return str(_extra(section, key)["consent"])


def decides(section: str, key: str) -> bool:
    """Tell whether a setting decides what comes out, and not only how it is made."""
    return bool(_extra(section, key)["decides"])


def is_basic(section: str, key: str) -> bool:
    """Tell whether ``--help`` shows a setting, and not only ``--help-all``."""
    return bool(_extra(section, key)["basic"])


def choices_of(section: str, key: str) -> list[str]:
    """Return the values that completion offers for a setting, none where they are unknown."""
    kind = item_of(kind_of(section, key))
    listed: list[str] = _extra(section, key)["choices"]
    return list(get_args(kind)) if get_origin(kind) is Literal else listed


def _extra(section: str, key: str) -> dict[str, Any]:
    return cast(dict[str, Any], SECTIONS[section].model_fields[key].json_schema_extra)


def kind_of(section: str, key: str) -> Any:
    """Return a setting's plain type: without bounds, and without the None of an unset one."""
    return _plain(SECTIONS[section].model_fields[key].annotation)


def item_of(kind: Any) -> Any:
    """Return the type of a list's items, and any other type as it is."""
    return get_args(kind)[0] if get_origin(kind) is list else kind


def _plain(annotation: Any) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _plain(arguments[0])
    if origin in (types.UnionType, Union):
        return next(_plain(a) for a in arguments if a is not type(None))
    if origin is list:
        return list[_plain(arguments[0])]  # type: ignore[misc]
    return annotation
