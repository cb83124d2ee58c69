"""Turns the keywords of a call into settings."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from typing_extensions import ParamSpec

from hisvd_cli.allocation.plan import Plan as PlanData
from hisvd_cli.pipelines.api.keywords import PathText
from hisvd_cli.pipelines.api.libraries import quiet_libraries
from hisvd_cli.pipelines.api.names import (
    PythonReporter,
    errors_in_python,
    in_python,
    keyword_of,
)
from hisvd_cli.pipelines.config.commands import SETTINGS, SEVERAL, Key
from hisvd_cli.pipelines.config.resolution import resolve
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.config.settings import SECTIONS, item_of, kind_of, methods_of
from hisvd_cli.pipelines.unused_options import check_options
from hisvd_cli.utils.errors import UsageError
from hisvd_cli.utils.files.cache import expanded
from hisvd_cli.utils.files.scratch import sweep
from hisvd_cli.utils.progress import Reporter, Silent

P = ParamSpec("P")
R = TypeVar("R")

_NEAR = 0.75
"""Similarity from which an unknown keyword is taken for a misspelt one."""

Given = dict[Key, Any]
"""Settings by (section, key), given in this call or in an earlier one."""


@dataclass(frozen=True)
class Run:
    """Settings and reporter of a call.

    Attributes:
        resolved: the settings.
        reporter: receives progress.
        own: the settings given in this call.
    """

    resolved: Resolved
    reporter: Reporter
    own: Collection[Key]

    def check_options(self, command: str, plan: PlanData | None = None) -> None:
        """Raise UsageError if a keyword of this call has no effect."""
        check_options(self.resolved, command, plan, self.own)

    def one_plan(self) -> None:
        """Raise UsageError if the settings request several plans."""
        for key in SEVERAL:
            if len(values := dict.fromkeys(self.resolved.value(*key))) > 1:
                raise UsageError(
                    f"'{keyword_of(key)}' has {len(values)} values: {', '.join(map(str, values))}.",
                    "Give one, and call the function once for each.",
                )


def function(keywords: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for a function of the Python API whose keywords are settings.

    It rejects unknown keywords, makes errors name keywords, and adds every setting with its default
    to the signature and the help.

    Args:
        keywords: the TypedDict of the function's settings.
    """
    typed = get_type_hints(keywords)

    def decorate(call: Callable[P, R]) -> Callable[P, R]:
        options = (key for key in SETTINGS[call.__name__] if methods_of(*key))
        hints = {keyword_of(key): kind_of(*key) for key in options} | typed
        own = [p for p in inspect.signature(call).parameters.values() if p.kind != p.VAR_KEYWORD]
        known = [*hints, *(p.name for p in own if p.kind != p.VAR_POSITIONAL)]

        @wraps(call)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            _check_known(call.__name__, kwargs, known)
            with errors_in_python(), quiet_libraries(everything=not kwargs.get("progress", True)):
                return call(*args, **kwargs)

        named = {keyword_of(key): key for key in SETTINGS[call.__name__]}
        keys = {keyword: key for keyword, key in named.items() if keyword in hints}
        shown = [*own, *(_parameter(name, key, hints[name]) for name, key in keys.items())]
        checked.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        checked.__doc__ = f"{call.__doc__}\n    Settings:\n{_described(keys)}\n"
        return checked

    return decorate


def _check_known(name: str, given: Collection[str], known: Collection[str]) -> None:
    """Raise TypeError, with the nearest known name if one is near, for an unknown keyword."""
    for keyword in given:
        if keyword not in known:
            others = [each for each, keys in SETTINGS.items() if keyword in map(keyword_of, keys)]
            near = get_close_matches(keyword, known, n=1, cutoff=_NEAR)
            instead = f"help(hisvd.{name}) lists all."
            if near:
                instead = f"Did you mean '{near[0]}'?"
            elif others:
                instead = f"It is a setting of {' and '.join(others)}."
            raise TypeError(f"{name}() got an unexpected keyword argument '{keyword}'. {instead}")


def _parameter(keyword: str, key: Key, hint: object) -> inspect.Parameter:
    default = SECTIONS[key[0]].model_fields[key[1]].default
    if key in SEVERAL:
        default = next(iter(default), None)
    return inspect.Parameter(
        keyword, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint
    )


def _described(keys: Mapping[str, Key]) -> str:
    fields = {keyword: SECTIONS[s].model_fields[k] for keyword, (s, k) in keys.items()}
    return "\n".join(
        f"        {keyword}: {in_python(str(field.description))}"
        for keyword, field in fields.items()
    )


def run_of(
    name: str,
    keywords: Mapping[str, object],
    profile: PathText | None,
    progress: bool,
    inherited: Given | None = None,
) -> Run:
    """Return settings and reporter of a call.

    Args:
        name: the function.
        keywords: the given settings; None counts as not given.
        profile: the profile to read. By default no profile is read; the environment never is.
        progress: whether to report on stderr.
        inherited: settings of an earlier call, which ``keywords`` override.

    Raises:
        UsageError: one line for every wrong value.
    """
    keys = {keyword_of(key): key for key in SETTINGS[name]}
    own = {keys[keyword]: _plain(value, keys[keyword]) for keyword, value in keywords.items()}
    given = {**(inherited or {}), **{key: v for key, v in own.items() if v is not None}}
    named = None if profile is None else Path(text_of(profile, "profile"))
    try:
        resolved = resolve(given, named, environ={}, search=False)
    except UsageError as error:
        if "--help" in error.hint:
            error.hint = f"help(hisvd.{name}) lists the settings, their values and defaults."
        raise
    sweep(resolved.settings.model.scratch)
    set_here = [key for key, value in own.items() if value is not None]
    return Run(resolved, PythonReporter() if progress else Silent(), set_here)


def path_of(path: PathText, argument: str = "output") -> Path:
    """Return a path with ``~`` expanded. Raises UsageError if the value is not a path."""
    return expanded(text_of(path, argument))


def text_of(value: object, argument: str, takes: str = "a path") -> str:
    """Return a path or a name as text.

    Args:
        value: the argument as given.
        argument: its name, for the error.
        takes: what it may be, for the error.

    Raises:
        UsageError: the value is neither a text nor a path.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if isinstance(text, str):
        return text
    given = "None" if value is None else f"a value of type {type(value).__name__}"
    hint = f"Give {takes}."
    if isinstance(value, list | tuple):
        hint += " Call the function once for each."
    raise UsageError(f"'{argument}' must be {takes}, not {given}.", hint)


def _plain(value: object, key: Key) -> object:
    """Return a value as the settings take it: paths, dtypes and devices as text, tuples as
    lists."""
    if isinstance(value, list | tuple):
        return [_plain(item, key) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    # As text it is rejected; pydantic reads True as 1.
    as_text = isinstance(value, bool) and item_of(kind_of(*key)) in (int, float)
    return str(value) if as_text else value
