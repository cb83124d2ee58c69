"""Methods found by name: built in, or brought by another package through an entry point."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from hisvd_cli.utils.errors import HisvdError, UsageError, suggest

F = TypeVar("F", bound=Callable[..., object])


class Registry(Generic[F]):
    """Functions of one kind.

    Args:
        kind: what an error message calls them.
        package: the package whose modules register themselves on import.
        group: the entry-point group of other packages' methods.
    """

    def __init__(self, kind: str, package: str, group: str) -> None:
        self._kind = kind
        self._package = package
        self._group = group
        self._methods: dict[str, F] = {}
        self._needs: dict[str, frozenset[str]] = {}

    def register(self, name: str, *, needs: Iterable[str] = ()) -> Callable[[F], F]:
        """Return a decorator that adds a function under ``name``.

        Args:
            name: what users call it.
            needs: what it needs of a calibration, see :data:`hisvd_cli.linalg.statistics.Need`.
        """

        def add(method: F) -> F:
            if self._methods.setdefault(name, method) is not method:
                raise ValueError(f"Two {self._kind}s are called '{name}'.")
            self._needs[name] = frozenset(needs)
            return method

        return add

    def needs(self, name: str) -> frozenset[str]:
        """Return what the method called ``name`` needs of a calibration. Raises as ``get``.

        One of another package says so in an attribute ``needs``.
        """
        method = self.get(name)
        return self._needs.get(name) or frozenset(getattr(method, "needs", ()))

    def names(self) -> list[str]:
        """Names of all methods, sorted."""
        self._load_builtin()
        return sorted({*self._methods, *(point.name for point in entry_points(group=self._group))})

    def get(self, name: str) -> F:
        """Return the method called ``name``; a built-in one wins.

        Raises:
            UsageError: there is none; names the nearest.
            HisvdError: the package that brings it cannot be loaded.
        """
        self._load_builtin()
        if name not in self._methods:
            for point in entry_points(group=self._group, name=name):
                self._methods[name] = self._load(point)
        if name not in self._methods:
            raise UsageError(f"No {self._kind} is called '{name}'.", suggest(name, self.names()))
        return self._methods[name]

    def _load(self, point: EntryPoint) -> F:
        try:
            method: F = point.load()
        except (ImportError, AttributeError) as error:
            raise HisvdError(
                f"The {self._kind} '{point.name}' ({point.value}) cannot be loaded: {error}.",
                "Update or remove the package that brings it.",
            ) from error
        return method

    def _load_builtin(self) -> None:
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")


def accepted(method: Callable[..., object], knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of ``knobs`` that a method names as keyword-only parameters, or all of them
    where it takes any."""
    parameters = inspect.signature(method).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(knobs)
    return {
        p.name: knobs[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY and p.name in knobs
    }
