"""hisvd: make causal language models smaller by low-rank factorisation.

The functions of the Python API and what they return are loaded when they are first used, for torch
and transformers take seconds to import.

Importing this package registers the ``hisvd`` quantization method with transformers (as soon as
transformers itself is imported), so that compressed folders load with plain ``from_pretrained``.
"""

import importlib
from typing import TYPE_CHECKING

from hisvd_cli.modeling.layers.import_hooks import when_imported

if TYPE_CHECKING:
    from hisvd_cli.pipelines.api import (
        Audit,
        Calibration,
        Checkpoint,
        Evaluation,
        Plan,
        calibrate,
        compress,
        convert,
        evaluate,
        inspect,
        load,
        plan,
    )

__all__ = [
    "Audit",
    "Calibration",
    "Checkpoint",
    "Evaluation",
    "Plan",
    "calibrate",
    "compress",
    "convert",
    "evaluate",
    "inspect",
    "load",
    "plan",
]
__version__ = "0.2.0"

# The module that holds transformers' quantizers; the plug-in registers itself by being imported.
# Transformers and torch take seconds to import, and ``hisvd --help`` needs neither of them.
when_imported(
    "transformers.quantizers.auto",
    lambda _: importlib.import_module("hisvd_cli.modeling.layers.transformers_plugin"),
)

if not TYPE_CHECKING:  # a type checker would take every name for one that is there

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module("hisvd_cli.pipelines.api"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
