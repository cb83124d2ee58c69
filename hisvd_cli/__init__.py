"""hisvd: make causal language models smaller by low-rank factorisation.

Importing this package registers the ``hisvd`` quantization method with transformers (as soon as
transformers itself is imported), so that compressed folders load with plain ``from_pretrained``.
"""

__version__ = "0.1.0"
