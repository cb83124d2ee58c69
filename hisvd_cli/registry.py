"""Methods found by name: built in, or brought by another package through an entry point."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from hisvd_cli.errors import UsageError, suggest

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

    def register(self, name: str) -> Callable[[F], F]:
        """Return a decorator that adds a function under ``name``."""

        def add(method: F) -> F:
            self._methods[name] = method
            return method

        return add

    def names(self) -> list[str]:
        """Names of all methods, sorted."""
        self._load_builtin()
        return sorted({*self._methods, *(point.name for point in entry_points(group=self._group))})

    def get(self, name: str) -> F:
        """Return the method called ``name``. Raises UsageError with the nearest name."""
        self._load_builtin()
        if name not in self._methods:
            for point in entry_points(group=self._group, name=name):
                self._methods[name] = point.load()
        if name not in self._methods:
            raise UsageError(f"No {self._kind} is called '{name}'.", suggest(name, self.names()))
        return self._methods[name]

    def _load_builtin(self) -> None:
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
