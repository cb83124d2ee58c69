"""Silences libraries during a call and restores them afterwards."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def quiet_libraries(everything: bool) -> Iterator[None]:
    """Silence the progress bars of transformers and datasets while the body runs.

    Args:
        everything: silence log lines, warnings, and download progress bars as well.
    """
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils import logging

    with ExitStack() as stack:
        downloads = not are_progress_bars_disabled()
        stack.callback(enable_progress_bars if downloads else disable_progress_bars)
        if logging.is_progress_bar_enabled():
            stack.callback(logging.enable_progress_bar)  # download bars as well
            logging.disable_progress_bar()
        if downloads and not everything:
            enable_progress_bars()
        if everything or "datasets" in sys.modules:  # importing it is slow
            _silence_datasets(stack)
        if everything:
            stack.callback(logging.set_verbosity, logging.get_verbosity())
            logging.set_verbosity_error()
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        yield


def _silence_datasets(stack: ExitStack) -> None:
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if not are_progress_bars_disabled():
        stack.callback(enable_progress_bars)
        disable_progress_bars()
