"""Failures of single models in a run over several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hisvd_cli.evaluation.grid import Failure
from hisvd_cli.utils.errors import HisvdError


@contextmanager
def recorded_failure(
    target: str, failures: list[Failure], alone: bool, memory_hint: str
) -> Iterator[None]:
    """Append an error of the body to ``failures`` instead of raising it.

    Args:
        target: the model that the body works on.
        failures: the list to extend.
        alone: whether it is the only model, so that errors are raised.
        memory_hint: the hint if memory runs out.
    """
    try:
        yield
    except HisvdError as error:
        if alone:
            raise
        failures.append(Failure(target, error.message, error.hint))
    except (MemoryError, torch.OutOfMemoryError):
        if alone:
            raise
        failures.append(Failure(target, "Out of memory.", memory_hint))
