"""Does something right after a module is imported, and at once where it is imported already.

This file travels with every checkpoint (see ``transformers_plugin.remote_code_files``), so it
imports the standard library and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import Loader, MetaPathFinder
else:  # importing the module of these takes longer than the rest of this package
    Loader = MetaPathFinder = object

Action = Callable[[ModuleType], object]


def when_imported(name: str, action: Action) -> None:
    """Call ``action`` with the module ``name`` once it is there.

    It is not imported for that: libraries that may never be needed take seconds.
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
        module.__loader__ = self._inner  # the module must not show that it was watched
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self._finder]
        self._finder.action(module)


class _Finder(MetaPathFinder):
    """Waits for the import of one module; finds nothing else."""

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
        # Others may wait for the same module: each wraps what the finders behind it find.
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        waiting = next((f for f in behind if isinstance(f, _Finder) and f.name == fullname), None)
        spec = (waiting or PathFinder).find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec
