"""How the command line keeps the libraries under it from drawing over its output."""

from __future__ import annotations

import logging
import os
import warnings

from hisvd_cli.utils.escaping import printable

_LOUD = ("transformers", "huggingface_hub", "datasets", "lm_eval")


def _make_printable(record: logging.LogRecord) -> bool:
    """Take control characters out of a line of a log, which may hold names from files."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def calm_libraries(quiet: bool, verbose: bool) -> None:
    """Silence the progress bars and the log lines of transformers and datasets.

    Downloads from the hub keep their bars. Only the command line does this: who imports
    ``hisvd_cli`` as a library keeps these settings as they are.

    Args:
        quiet: silence the bars of downloads too.
        verbose: let warnings through.
    """
    # Read when these libraries are imported, which is below at the earliest.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars that nobody turned on or off
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as logs

    downloads = not (quiet or are_progress_bars_disabled())
    logs.disable_progress_bar()  # the hub's as well
    if downloads:
        enable_progress_bars()
    for library in _LOUD:
        for handler in logging.getLogger(library).handlers:
            handler.addFilter(_make_printable)
    if not verbose:
        logs.set_verbosity_error()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
