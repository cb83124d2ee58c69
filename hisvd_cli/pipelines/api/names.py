"""Names of settings in Python, and messages with those names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from hisvd_cli.pipelines.config.commands import Key
from hisvd_cli.pipelines.config.mentions import Mention, mention_of, replace
from hisvd_cli.pipelines.config.settings import ARGUMENTS, SECTIONS, flag_of
from hisvd_cli.utils.errors import HisvdError
from hisvd_cli.utils.progress import StderrReporter


def keyword_of(key: Key) -> str:
    """Return the keyword of a setting: its flag as a Python name, such as ``rank_method``."""
    return _python_name(flag_of(*key))


def _python_name(flag: str) -> str:
    return "source" if flag == "--from" else flag.removeprefix("--").replace("-", "_")


_FLAGS = {
    mention.flag: mention
    for mention in (
        *map(mention_of, ARGUMENTS),
        *(mention_of(s, k) for s, model in SECTIONS.items() for k in model.model_fields),
    )
    if mention is not None
}
# A recommended command is not changed, up to the end of its line.
_FLAG = re.compile(
    r"\bhisvd (?:calibrate|plan|compress|eval|inspect|convert)\b.*|(?<![\w-])--[\w-]+"
)
_GIVEN = re.compile(r"(?m)^(--[\w-]+) (.*?) (?=must |is invalid|has too many)")
_PLAIN = re.compile(r"-?[\d.]+(e-?\d+)?|True|False|None|\[.*\]")
"""A value that stands in Python code without quotes."""


def in_python(text: str) -> str:
    """Return a message with keywords in place of settings and flags: in quotes, or with a value."""
    return _FLAG.sub(_named, _GIVEN.sub(_given, replace(text, _keyword)))


def _keyword(mention: Mention) -> str:
    name = _python_name(mention.flag)
    if mention.value is not None:
        return f"{name}={_code(mention.value)}"
    if mention.off or mention.kind is bool:
        return f"{name}={not mention.off}"
    return f"'{name}'"


def _code(value: str) -> str:
    return value if _PLAIN.fullmatch(value) else repr(value)


def _given(found: re.Match[str]) -> str:
    return f"{_python_name(found[1])}={_code(found[2])} "


def _named(found: re.Match[str]) -> str:
    flag = found[0]
    if off := _FLAGS.get(flag.replace("--no-", "--", 1)) if flag.startswith("--no-") else None:
        return f"{_python_name(off.flag)}=False"
    return _keyword(_FLAGS[flag]) if flag in _FLAGS else flag


@contextmanager
def errors_in_python() -> Iterator[None]:
    """Make errors of the body name keywords, with their hint in the traceback."""
    try:
        yield
    except HisvdError as error:
        error.message, error.hint = in_python(error.message), in_python(error.hint)
        error.args = ("\n".join(filter(None, (error.message, error.hint))),)
        raise


class PythonReporter(StderrReporter):
    """Reports on stderr, with keywords in place of flags."""

    def worded(self, message: str) -> str:
        """Return a message with keywords in place of the settings that it mentions."""
        return in_python(message)
