"""Runs an action when a module is imported, or immediately if it already is.

This file is copied into every checkpoint (see ``transformers_plugin.remote_code_files``), so it
only imports the standard library.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import Loader, MetaPathFinder
else:  # importing importlib.abc takes longer than importing the rest of this package
    Loader = MetaPathFinder = object

Action = Callable[[ModuleType], object]


def when_imported(name: str, action: Action) -> None:
    """Call ``action`` with the module ``name`` once it is imported.

    The module is not imported here, because large libraries take seconds to import.
    """
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, action))


class _Loader(Loader):
    """Runs a module's own loader, then the action."""

    def __init__(self, inner: Loader, finder: _Finder) -> None:
        self._inner = inner
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._inner  # the module must look as if imported normally
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self._finder]
        self._finder.action(module)


class _Finder(MetaPathFinder):
    """Wraps the import of one module; finds no others."""

    def __init__(self, name: str, action: Action) -> None:
        self.name = name
        self.action = action

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        # Several finders may wait for the same module: each wraps the result of the next.
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        waiting = next((f for f in behind if _waits(f, fullname)), PathFinder)
        spec = waiting.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


def _waits(finder: object, name: str) -> bool:
    """Return whether a finder is one of this file, or of a copy of it in a checkpoint."""
    return type(finder).__name__ == _Finder.__name__ and getattr(finder, "name", None) == name
