"""Keeps log lines and progress bars of libraries out of the output."""

from __future__ import annotations

import logging
import os
import warnings

from hisvd_cli.utils.escaping import printable

_LOUD = ("transformers", "huggingface_hub", "datasets", "lm_eval")


def _make_printable(record: logging.LogRecord) -> bool:
    """Remove control characters from a log line, which may contain names from files."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def calm_libraries(quiet: bool, verbose: bool) -> None:
    """Disable progress bars and log lines of transformers and datasets.

    Downloads from the Hub keep their bars. Only the command line calls this, not the Python API.

    Args:
        quiet: disable the bars of downloads too.
        verbose: keep warnings.
    """
    # These variables are read when the libraries are imported, below or later.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars that are not enabled explicitly
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as logs

    downloads = not (quiet or are_progress_bars_disabled())
    logs.disable_progress_bar()  # also disables those of the Hub
    if downloads:
        enable_progress_bars()
    for library in _LOUD:
        for handler in logging.getLogger(library).handlers:
            handler.addFilter(_make_printable)
    if not verbose:
        logs.set_verbosity_error()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
