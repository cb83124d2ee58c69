"""Print the perplexity of every reference on the demo model, at several keep ratios.

``python -m tests.references [name …]``
"""

from __future__ import annotations

import sys
import time

import torch

from tests.references import REFERENCES
from tests.references.demo import demo_study, evaluation_windows

RATIOS = (0.9, 0.8, 0.6, 0.4)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(names: list[str]) -> None:
    """Print a table of the named references, or of all."""
    torch.set_num_threads(1)
    study = demo_study()
    windows = evaluation_windows()
    count, length = study.windows.shape
    _say(f"demo model, calibration {count} × {length}, evaluation {len(windows)} × {length} tokens")
    _say(f"{'dense':12}{study.perplexity(windows):10.2f}")
    _say(f"{'keep':12}" + "".join(f"{ratio:10}" for ratio in RATIOS) + f"{'seconds':>10}")
    for name in names or REFERENCES:
        started = time.monotonic()
        values = [study.perplexity(windows, REFERENCES[name](study, r)) for r in RATIOS]
        seconds = time.monotonic() - started
        _say(f"{name:12}" + "".join(f"{v:10.2f}" for v in values) + f"{seconds:10.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
