"""What settings are made of: a field with its help, and the types that several share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
)
from pydantic_core import PydanticCustomError

from hisvd_cli.utils.memory_bounds import checked

_UNWRITABLE = re.compile("[\0\ud800-\udfff]")


def _as_list(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


def _as_items(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else [value]


def _none_or_list(value: object) -> object:
    return [] if value is None else _as_list(value)


def _once(values: list[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _words(value: object) -> object:
    """Take commas in each text of a list apart, as lm-eval's command line does."""
    items = value if isinstance(value, list | tuple) else [value]
    texts = (item.split(",") if isinstance(item, str) else [item] for item in items)
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
    **bounds: Any,
) -> Any:
    """Return a field.

    Args:
        default: its default.
        text: what ``--help`` says of it.
        flag: its flag, where that is not the key's name.
        panel: its panel in ``--help``, where that is not its section's.
        choices: values that completion offers, where others may be allowed too.
        consent: what it does that somebody must ask for, such as running code or sending data: it
            then counts from a flag, the environment and a profile that was named, and is an error
            in one that was only found.
        decides: whether it decides what comes out, and not only how it is made: artifacts record
            such settings, and those of ``[calibration]`` choose which calibration is meant.
        basic: whether ``--help`` shows it, and not only ``--help-all``.
        bounds: what pydantic checks.
    """
    extra: dict[str, Any] = {
        "flag": flag,
        "panel": panel,
        "choices": list(choices),
        "consent": consent,
        "decides": decides,
        "basic": basic,
    }
    return Field(default, description=text, json_schema_extra=extra, **bounds)


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
# The methods that hisvd brings, written out so that help and completion need no torch. Another
# package may bring more, so neither is a Literal.
ALLOCATOR_NAMES = (
    *("hisvd", "uniform", "svdllm-v2", "asvd", "zero-sum", "swift", "lems"),
    *("waterfill", "learned"),
)
DECOMPOSER_NAMES = ("svd", "asvd", "whitened", "fwsvd", "gfwsvd", "fisher", "randomized")


def any_of(names: Sequence[str]) -> str:
    """Return names as help says them: a, b or c."""
    return f"{', '.join(names[:-1])} or {names[-1]}"


MANY = 10**9
"""Upper bound of counts: more than anybody asks for, and small enough to be multiplied."""
LARGEST_SEED = 2**63 - 1

Ratio = Annotated[float, Field(gt=0, le=1)]
Ratios = Annotated[list[Ratio], Field(min_length=1), BeforeValidator(_as_list)]
Names = Annotated[list[str], BeforeValidator(_as_list)]
Presets = Annotated[list[PresetName], BeforeValidator(_none_or_list), AfterValidator(_once)]
Words = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_words)]
Counts = Annotated[
    list[Annotated[int, Field(ge=1, le=MANY)]], Field(min_length=1), BeforeValidator(_words)
]
Memory = Annotated[str, AfterValidator(checked)]
Methods = Annotated[list[str], Field(min_length=1), BeforeValidator(_as_list)]


class Section(BaseModel):
    """A table of the profile; a key that it does not name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain_text(cls, value: object) -> object:
        """Refuse what no file name or no file can hold: NUL, and bytes that are no UTF-8."""
        if any(_UNWRITABLE.search(item) for item in _as_items(value) if isinstance(item, str)):
            raise PydanticCustomError("unwritable", "a text of UTF-8, without NUL")
        return value
