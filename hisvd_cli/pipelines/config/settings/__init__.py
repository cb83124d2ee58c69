"""All settings, with default, bounds and help text; one file per section.

A field of a section is a key of ``hisvd.toml``, a flag, and an environment variable
``HISVD_<SECTION>_<KEY>``. Allocators add their options to ``[plan]``, decomposers to
``[compress]``.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hisvd_cli.allocation.methods import ALLOCATORS
from hisvd_cli.compression.methods import DECOMPOSERS
from hisvd_cli.pipelines.config.settings import compress, plan
from hisvd_cli.pipelines.config.settings.evaluation import EvalSettings
from hisvd_cli.pipelines.config.settings.fields import (
    ALLOCATOR_NAMES,
    DECOMPOSER_NAMES,
    PresetName,
    Section,
    attributes,
    default_flag,
)
from hisvd_cli.pipelines.config.settings.method_options import with_options
from hisvd_cli.pipelines.config.settings.model import CalibrationSettings, ModelSettings
from hisvd_cli.pipelines.config.settings.quantize import QuantizeSettings
from hisvd_cli.pipelines.config.settings.recover import RecoverSettings

if TYPE_CHECKING:
    from hisvd_cli.pipelines.config.settings.compress import CompressSettings
    from hisvd_cli.pipelines.config.settings.plan import PlanSettings

__all__ = [
    "ALLOCATOR_NAMES",
    "ARGUMENTS",
    "DECOMPOSER_NAMES",
    "RESERVED",
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
    "metavar_of",
    "methods_of",
    "panel_of",
]

ARGUMENTS = (
    *("output", "overwrite", "plan", "profile", "from", "to", "push-to-hub", "private"),
    *("markdown", "csv", "report", "fresh", "update-card"),
)
"""Arguments of commands that are not settings."""
RESERVED = (
    *ARGUMENTS,
    *("set", "show-profile", "list-profiles", "spectrum-of", "tables", "dry-run", "json"),
    *("quiet", "verbose", "help", "help-all", "source", "progress"),
)
"""Names that options of methods cannot have, besides those of settings."""


def _flags(*sections: type[BaseModel]) -> Iterable[str]:
    """Return the flags of all settings of sections or option models."""
    for section in sections:
        for key, field in section.model_fields.items():
            yield _flag(key, field)


def _flag(key: str, field: FieldInfo) -> str:
    return str(_attributes(field)["flag"]) or default_flag(key)


def _attributes(field: FieldInfo) -> dict[str, Any]:
    return cast(dict[str, Any], field.json_schema_extra) or attributes()


if not TYPE_CHECKING:
    # Another package's allocator must not take the name of a built-in decomposer's option.
    _BUILT_IN = (
        m for m in DECOMPOSERS.declared().values() if m.__module__.startswith("hisvd_cli.")
    )
    _TAKEN = {
        *(f"--{name}" for name in RESERVED),
        *_flags(
            ModelSettings, CalibrationSettings, RecoverSettings, QuantizeSettings, EvalSettings
        ),
        *_flags(plan.PlanSettings, compress.CompressSettings),
    }
    PlanSettings = with_options(
        plan.PlanSettings, ALLOCATORS, plan.ALLOCATOR_PANEL, {*_TAKEN, *_flags(*_BUILT_IN)}
    )
    CompressSettings = with_options(
        compress.CompressSettings,
        DECOMPOSERS,
        "Decomposer options",
        {*_TAKEN, *_flags(PlanSettings)},
    )


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
    return _flag(key, SECTIONS[section].model_fields[key])


def panel_of(section: str, key: str) -> str:
    """Return the panel of a setting in ``--help``, empty if it is that of its section."""
    return str(_extra(section, key)["panel"])


def consent_of(section: str, key: str) -> str:
    """Return the effect of a setting that requires consent, empty if there is none."""
    return str(_extra(section, key)["consent"])


def decides(section: str, key: str) -> bool:
    """Return whether a setting affects the result, and not only how it is computed."""
    return bool(_extra(section, key)["decides"])


def metavar_of(section: str, key: str) -> str:
    """Return the placeholder of a value in ``--help``, empty if it is that of the type."""
    return str(_extra(section, key)["metavar"])


def is_basic(section: str, key: str) -> bool:
    """Return whether ``--help`` shows a setting, and not only ``--help-all``."""
    return bool(_extra(section, key)["basic"])


def methods_of(section: str, key: str) -> list[str]:
    """Return the methods that have a setting as their option, empty for other settings."""
    return cast(list[str], _extra(section, key)["methods"])


def choices_of(section: str, key: str) -> list[str]:
    """Return the values that completion offers for a setting, if any."""
    kind = item_of(kind_of(section, key))
    listed: list[str] = _extra(section, key)["choices"]
    return list(get_args(kind)) if get_origin(kind) is Literal else listed


def _extra(section: str, key: str) -> dict[str, Any]:
    return _attributes(SECTIONS[section].model_fields[key])


def kind_of(section: str, key: str) -> Any:
    """Return the type of a setting, without bounds and None."""
    return _plain(SECTIONS[section].model_fields[key].annotation)


def item_of(kind: Any) -> Any:
    """Return the item type of a list type, and any other type unchanged."""
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
