"""hisvd: make causal language models smaller by low-rank factorisation.

Importing this package registers the ``hisvd`` quantization method with transformers (as soon as
transformers itself is imported), so that compressed folders load with plain ``from_pretrained``.
"""

import importlib

from hisvd_cli.modeling.layers.import_hooks import when_imported

__version__ = "0.2.0"

# The module that holds transformers' quantizers; the plug-in registers itself by being imported.
# Transformers and torch take seconds to import, and ``hisvd --help`` needs neither of them.
when_imported(
    "transformers.quantizers.auto",
    lambda _: importlib.import_module("hisvd_cli.modeling.layers.transformers_plugin"),
)
