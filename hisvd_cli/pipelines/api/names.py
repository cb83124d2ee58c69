"""Names of settings in Python, and messages with those names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from hisvd_cli.pipelines.config.commands import Key
from hisvd_cli.pipelines.config.mentions import replace
from hisvd_cli.pipelines.config.settings import ARGUMENTS, SECTIONS, flag_of
from hisvd_cli.utils.errors import HisvdError
from hisvd_cli.utils.progress import StderrReporter


def keyword_of(key: Key) -> str:
    """Return the keyword of a setting: its flag as a Python name, such as ``rank_method``."""
    return _python_name(flag_of(*key))


def _python_name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


_OWN_FLAGS = tuple(f"--{name}" for name in ARGUMENTS)
_PYTHON = {
    flag: _python_name(flag)
    for flag in (*_OWN_FLAGS, *(flag_of(s, k) for s, m in SECTIONS.items() for k in m.model_fields))
} | {"--from": "source"}
# A recommended command is not changed, up to the end of its line.
_FLAG = re.compile(
    r"\bhisvd (?:calibrate|plan|compress|eval|inspect|convert)\b.*|(?<![\w-])--[\w-]+"
)
_GIVEN = re.compile(r"(?m)^(--[\w-]+) (?=.* must )")


def in_python(text: str) -> str:
    """Return a message with keywords in place of settings and flags."""
    return _FLAG.sub(_named, _GIVEN.sub(r"\1=", replace(text, _keyword)))


def _keyword(flag: str, off: bool) -> str:
    keyword = _PYTHON.get(flag, _python_name(flag))
    return f"{keyword}=False" if off else keyword


def _named(found: re.Match[str]) -> str:
    flag = found[0]
    if off := _PYTHON.get(flag.replace("--no-", "--", 1)) if flag.startswith("--no-") else None:
        return f"{off}=False"
    return _PYTHON.get(flag, flag)


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
