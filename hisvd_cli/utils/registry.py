"""Registries of methods and their options: built in, or from another package's entry points.

Loading a built-in method does not import torch: help and profiles read the options of all methods.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from hisvd_cli.utils.errors import HisvdError, UsageError, suggest

F = TypeVar("F", bound=Callable[..., object])

MANY = 10**9
"""Upper bound of counts: large enough for every use, small enough to be multiplied."""

Ratio = Annotated[float, Field(gt=0, le=1)]


def as_list(value: object) -> Sequence[object]:
    """Return a list as it is, and any other value as the only item of one."""
    return value if isinstance(value, list | tuple) else [value]


Ratios = Annotated[list[Ratio], Field(min_length=1), BeforeValidator(as_list)]


class Options(BaseModel):
    """Options of a method. Every field has a default and a description, the text of ``--help``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Needs = Iterable[str] | Callable[[Any], Iterable[str]]
"""What a method needs, or a function that returns it for given options."""


@dataclass(frozen=True)
class _Method(Generic[F]):
    function: F
    options: type[BaseModel]
    needs: Needs


class Registry(Generic[F]):
    """Methods of one kind.

    Args:
        kind: the kind, as error messages name it.
        package: the package whose modules register methods on import.
        group: the entry-point group for methods of other packages.
        order: names that come first in lists; the others follow in alphabetical order.
    """

    def __init__(self, kind: str, package: str, group: str, order: Sequence[str] = ()) -> None:
        self._kind = kind
        self._package = package
        self._group = group
        self._order = {name: i for i, name in enumerate(order)}
        self._methods: dict[str, _Method[F]] = {}
        self._rejected: dict[str, str] = {}

    def register(
        self, name: str, *, needs: Needs = (), options: type[BaseModel] = Options
    ) -> Callable[[F], F]:
        """Return a decorator that registers a function.

        Args:
            name: the name of the method.
            needs: the statistics that it needs, see :data:`hisvd_cli.linalg.statistics.Need`.
            options: its options. The function receives an instance as the keyword ``options``.

        Raises:
            ValueError: an option has no default, or the name is taken.
        """
        for key, field in options.model_fields.items():
            if field.is_required() or field.default_factory is not None:
                raise ValueError(f"Option '{key}' of the {self._kind} '{name}' has no default.")

        def add(function: F) -> F:
            method = _Method(function, options, needs)
            if self._methods.setdefault(name, method).function is not function:
                raise ValueError(f"Two {self._kind}s are named '{name}'.")
            return function

        return add

    def names(self) -> list[str]:
        """Return the names of all methods."""
        self._load_builtin()
        found = {*self._methods, *(point.name for point in self._outside)}
        return sorted(found, key=lambda name: (self._order.get(name, len(self._order)), name))

    def get(self, name: str) -> F:
        """Return the function of a method. A built-in method takes precedence.

        Raises:
            UsageError: there is no such method.
            HisvdError: the method belongs to a package that cannot be loaded.
        """
        return self._method(name).function

    def needs(self, name: str, values: Mapping[str, Any] | None = None) -> frozenset[str]:
        """Return what a method needs with the options in ``values``. Raises as :meth:`get`."""
        needs = self._method(name).needs
        return frozenset(needs(self.options(name, values or {})) if callable(needs) else needs)

    def options(self, name: str, values: Mapping[str, Any]) -> BaseModel:
        """Return the options of a method, from those ``values`` that it declares. Raises as
        :meth:`get`."""
        model = self._method(name).options
        return model(**{key: values[key] for key in model.model_fields if key in values})

    def arguments(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of a method: its options, and those ``values`` that are
        keyword-only parameters of its function. Raises as :meth:`get`."""
        parameters = inspect.signature(self.get(name)).parameters.values()
        given = {**values, "options": self.options(name, values)}
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return given
        return {
            p.name: given[p.name]
            for p in parameters
            if p.kind is p.KEYWORD_ONLY and p.name in given
        }

    def takes(self, name: str, key: str) -> bool:
        """Return whether a method has an option, or its function a parameter of this name. Raises
        as :meth:`get`."""
        parameters = inspect.signature(self.get(name)).parameters
        free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return free or key in parameters or key in self._method(name).options.model_fields

    def declared(self) -> dict[str, type[BaseModel]]:
        """Return the option models of all methods by name. A method that cannot be loaded is left
        out; the error is raised when it is used."""
        found = {}
        for name in self.names():
            with suppress(HisvdError):
                found[name] = self._method(name).options
        return found

    def reject(self, name: str, reason: str) -> None:
        """Make every use of a method an error."""
        self._rejected[name] = reason

    def _method(self, name: str) -> _Method[F]:
        self._load_builtin()
        if name not in self._methods:
            for point in self._outside:
                if point.name == name:
                    self._load(point)
        if name not in self._methods:
            raise UsageError(f"There is no {self._kind} '{name}'.", suggest(name, self.names()))
        if name in self._rejected:
            raise self._unusable(f"'{name}'", self._rejected[name])
        return self._methods[name]

    @cached_property
    def _outside(self) -> Sequence[EntryPoint]:
        """The entry points of other packages: finding them reads the metadata of all packages."""
        return tuple(entry_points(group=self._group))

    def _load(self, point: EntryPoint) -> None:
        """Import the function of an entry point. Its module may register it under the same name;
        otherwise the method has no options, and its attribute ``needs`` says what it needs."""
        try:
            function: F = point.load()
            needs = tuple(getattr(function, "needs", ()))
        except Exception as error:  # any error in another package's module
            self._methods.pop(point.name, None)
            raise self._unusable(f"'{point.name}' ({point.value})", str(error)) from error
        self._methods.setdefault(point.name, _Method(function, Options, needs))

    def _unusable(self, name: str, reason: str) -> HisvdError:
        return HisvdError(
            f"The {self._kind} {name} cannot be loaded: {reason.removesuffix('.')}.",
            "Update or remove the package that provides it.",
        )

    def _load_builtin(self) -> None:
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")


def flattened(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of a method with every option as an entry of its own."""
    flat: dict[str, Any] = {}
    for key, value in arguments.items():
        flat |= value.model_dump() if isinstance(value, BaseModel) else {key: value}
    return flat
