"""Fields of the settings, and types that several settings share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator
from pydantic_core import PydanticCustomError

from hisvd_cli.allocation.methods import ALLOCATORS
from hisvd_cli.compression.methods import DECOMPOSERS
from hisvd_cli.utils.quantities import checked
from hisvd_cli.utils.registry import MANY, Options, as_list

_UNWRITABLE = re.compile("[\0\ud800-\udfff]")


def _none_or_list(value: object) -> object:
    return [] if value is None else as_list(value)


def _once(values: list[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _words(value: object) -> object:
    """Split each text of a list at commas, as lm-eval's command line does."""
    texts = (item.split(",") if isinstance(item, str) else [item] for item in as_list(value))
    return [item.strip() if isinstance(item, str) else item for part in texts for item in part]


def setting(
    default: Any,
    text: str,
    flag: str = "",
    *,
    panel: str = "",
    choices: Sequence[str] = (),
    consent: str = "",
    decides: bool = True,
    basic: bool = False,
    metavar: str = "",
    **bounds: Any,
) -> Any:
    """Return the field of a setting.

    Args:
        default: the default.
        text: the text of ``--help``.
        flag: the flag, if it is not the name of the key.
        panel: the panel in ``--help``, if it is not that of the section.
        choices: values that completion offers; others may be allowed.
        consent: the effect that requires consent, such as running code or sending data. The
            setting is then an error in a profile that was found, not named by the user.
        decides: whether it affects the result: artifacts record such settings, and those of
            ``[calibration]`` identify the calibration.
        basic: whether ``--help`` shows it, and not only ``--help-all``.
        metavar: the placeholder of its value in ``--help``, if it is not that of its type.
        bounds: bounds that pydantic checks.
    """
    extra = attributes(
        flag=flag,
        panel=panel,
        choices=choices,
        consent=consent,
        decides=decides,
        basic=basic,
        metavar=metavar,
    )
    return Field(default, description=text, json_schema_extra=extra, **bounds)


def attributes(
    *,
    flag: str = "",
    panel: str = "",
    choices: Sequence[str] = (),
    consent: str = "",
    decides: bool = True,
    basic: bool = False,
    metavar: str = "",
    methods: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the attributes of a setting besides its pydantic field, see :func:`setting`.

    ``methods`` names the methods with this option; it is empty for other settings.
    """
    return {
        "flag": flag,
        "panel": panel,
        "choices": list(choices),
        "consent": consent,
        "decides": decides,
        "basic": basic,
        "metavar": metavar,
        "methods": list(methods),
    }


def default_flag(key: str) -> str:
    """Return the flag of a setting that names none."""
    return f"--{key.replace('_', '-')}"


PresetName = Literal[
    "hisvd",
    "svd-llm",
    "svd-llm-v2",
    "rsvd-llm",
    "asvd",
    "fwsvd",
    "gfwsvd",
    "zs-svd",
    "lems",
    "swift-svd",
    "dobi-svd",
    "best",
]
ALLOCATOR_NAMES = tuple(ALLOCATORS.declared())
DECOMPOSER_NAMES = tuple(DECOMPOSERS.declared())


def any_of(names: Sequence[str]) -> str:
    """Return names as an enumeration: a, b or c."""
    return f"{', '.join(names[:-1])} or {names[-1]}"


LARGEST_SEED = 2**63 - 1

Names = Annotated[list[str], BeforeValidator(as_list)]
Presets = Annotated[list[PresetName], BeforeValidator(_none_or_list), AfterValidator(_once)]
Words = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_words)]
Counts = Annotated[
    list[Annotated[int, Field(ge=1, le=MANY)]], Field(min_length=1), BeforeValidator(_words)
]
Memory = Annotated[str, AfterValidator(checked)]
Methods = Annotated[list[str], Field(min_length=1), BeforeValidator(as_list)]


class Section(Options):
    """A table of the profile. Unknown keys are errors."""

    @field_validator("*", mode="before")
    @classmethod
    def _plain_text(cls, value: object) -> object:
        """Reject NUL, which no file name can contain, and bytes that are not UTF-8."""
        if any(_UNWRITABLE.search(item) for item in as_list(value) if isinstance(item, str)):
            raise PydanticCustomError("unwritable", "UTF-8 text without NUL")
        return value
