"""Methods by name: built in, or from other packages through entry points."""

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
    """Methods of one kind, by name.

    Args:
        kind: the kind as error messages name it, such as "allocator".
        package: the package whose modules register methods on import.
        group: the entry-point group for methods of other packages.
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
            name: the name in settings.
            needs: the statistics it requires, see :data:`hisvd_cli.linalg.statistics.Need`.
        """

        def add(method: F) -> F:
            if self._methods.setdefault(name, method) is not method:
                raise ValueError(f"Two {self._kind}s are named '{name}'.")
            self._needs[name] = frozenset(needs)
            return method

        return add

    def needs(self, name: str) -> frozenset[str]:
        """Return the statistics that the method ``name`` requires. Raises as :meth:`get`.

        Methods of other packages declare them in an attribute ``needs``.
        """
        method = self.get(name)
        return self._needs.get(name) or frozenset(getattr(method, "needs", ()))

    def names(self) -> list[str]:
        """Return the names of all methods, sorted."""
        self._load_builtin()
        return sorted({*self._methods, *(point.name for point in entry_points(group=self._group))})

    def get(self, name: str) -> F:
        """Return the method ``name``; built-in methods take precedence.

        Raises:
            UsageError: there is none; suggests the closest name.
            HisvdError: the package that provides it cannot be loaded.
        """
        self._load_builtin()
        if name not in self._methods:
            for point in entry_points(group=self._group, name=name):
                self._methods[name] = self._load(point)
        if name not in self._methods:
            raise UsageError(f"There is no {self._kind} '{name}'.", suggest(name, self.names()))
        return self._methods[name]

    def _load(self, point: EntryPoint) -> F:
        try:
            method: F = point.load()
        except (ImportError, AttributeError) as error:
            raise HisvdError(
                f"The {self._kind} '{point.name}' ({point.value}) cannot be loaded: {error}.",
                "Update or remove the package that provides it.",
            ) from error
        return method

    def _load_builtin(self) -> None:
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")


def accepted(method: Callable[..., object], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``options`` that a method accepts as keyword-only parameters; all of them if it
    takes ``**kwargs``."""
    parameters = inspect.signature(method).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(options)
    return {
        p.name: options[p.name]
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name in options
    }
