"""Adds the options of methods to the sections of the settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar, cast

from pydantic import BaseModel, create_model

from hisvd_cli.pipelines.config.settings.fields import Section, attributes, default_flag
from hisvd_cli.utils.registry import Registry

S = TypeVar("S", bound=Section)


def with_options(
    section: type[S], registry: Registry[Any], panel: str, taken: Collection[str]
) -> type[S]:
    """Return a section with the options of all methods of a registry as further fields.

    A method with an option whose flag is taken is rejected: using the method is then an error.

    Args:
        section: the section without options.
        registry: the methods. Options that two methods inherit from one class are shared.
        panel: the panel of the options in ``--help-all``.
        taken: flags that options cannot have.
    """
    owners: dict[str, type] = {}
    models: dict[str, type[BaseModel]] = {}
    for name, model in registry.declared().items():
        own = {key: _owner(model, key) for key in model.model_fields}
        clashes = [
            key
            for key, owner in own.items()
            if default_flag(key) in taken or owners.get(key, owner) is not owner
        ]
        if clashes:
            registry.reject(name, f"the name of its option '{clashes[0]}' is taken")
        else:
            owners |= own
            models[name] = model
    bases = dict.fromkeys(
        m for m in models.values() if m.model_fields and not _is_extended(m, models)
    )
    made = create_model(
        section.__name__,
        __base__=cast(tuple[type[S], ...], (*reversed(bases), section)),
        __module__=section.__module__,
        __doc__=section.__doc__,
    )
    for key in owners:
        field = made.model_fields[key]
        users = [name for name, model in models.items() if key in model.model_fields]
        field.description = f"{', '.join(users)}: {field.description or key}"
        field.json_schema_extra = attributes(panel=panel, methods=users)
    return made


def _owner(model: type[BaseModel], key: str) -> type:
    """Return the class that declares a field."""
    return next(base for base in model.__mro__ if key in vars(base).get("__annotations__", {}))


def _is_extended(model: type[BaseModel], models: Mapping[str, type[BaseModel]]) -> bool:
    return any(issubclass(other, model) and other is not model for other in models.values())
