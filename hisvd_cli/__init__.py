"""hisvd: make causal language models smaller by low-rank factorisation.

Importing this package registers the ``hisvd`` quantization method with transformers (as soon as
transformers itself is imported), so that compressed folders load with plain ``from_pretrained``.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

__version__ = "0.1.0"

_REGISTRY = "transformers.quantizers.auto"  # the module that holds transformers' quantizers
_PLUGIN = "hisvd_cli.transformers_plugin"  # registers itself with it by being imported


class _RegisteringLoader(Loader):
    """Runs the registry's own loader, then imports the plug-in."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._inner  # the module must not show that it was watched
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _RegistryFinder)]
        importlib.import_module(_PLUGIN)


class _RegistryFinder(MetaPathFinder):
    """Waits for the import of transformers' registry; finds nothing else."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == _REGISTRY else None
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def _register_with_transformers() -> None:
    """Import the plug-in now if transformers' registry is loaded, else right after it is.

    Transformers and torch take seconds to import, and ``hisvd --help`` needs neither of them.
    """
    if _REGISTRY in sys.modules:
        importlib.import_module(_PLUGIN)
    else:
        sys.meta_path.insert(0, _RegistryFinder())


_register_with_transformers()
