"""Evaluation beside an independent loop, and bfloat16 beside float32, as ratios in one run.

The loop is what people write: tokenize, ``model(window, labels=window).loss``, the mean. Both read
the same windows with the same model in memory and take turns, so that whatever slows the machine
slows both; medians of some turns, after one that is not counted::

    python tests/benchmarks/evaluation.py MODEL ../shared/data/wikitext-2/test.raw.txt --threads 2 \
        --output tests/benchmarks/evaluation.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hisvd_cli.calibration.text.datasets import load_text
from hisvd_cli.evaluation.perplexity import evaluation_windows
from hisvd_cli.modeling.divergence import token_losses
from hisvd_cli.modeling.passes import Resident
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.whole_model import load_model


def by_hand(model: Any, ids: torch.Tensor) -> float:
    """Return the perplexity of windows ``[W, L]``, as the independent loop has it."""
    losses = []
    for window in ids.split(1):
        with torch.no_grad():
            losses.append(float(model(window, labels=window).loss))
    return math.exp(sum(losses) / len(losses))


def by_hisvd(model: Any, ids: torch.Tensor) -> float:
    """Return the same from the parts of ``hisvd eval``."""
    total = 0.0
    for window, output in zip(ids, Resident(model, 1).run(ids), strict=True):
        total += float(token_losses(output.logits[0], window).double().sum())
    return math.exp(total / ids[:, 1:].numel())


def timed(measure: Callable[[Any, torch.Tensor], float], model: Any, ids: torch.Tensor) -> float:
    """Return the seconds of one measurement."""
    started = time.perf_counter()
    measure(model, ids)
    return time.perf_counter() - started


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="folder, .gguf file or hub id")
    parser.add_argument("text", help="evaluation text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a .json file")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    source, cpu = open_source(given.model), torch.device("cpu")
    text = load_text(given.text, "evaluation")
    ids = evaluation_windows(text, source, given.seqlen, given.windows).ids
    dtypes = (torch.float32, torch.bfloat16)
    models = [load_model(Path(source.folder), cpu, dtype) for dtype in dtypes]
    pairs = [(measure, model) for model in models for measure in (by_hand, by_hisvd)]
    turns = [
        [timed(measure, model, ids) for measure, model in pairs] for _ in range(given.turns + 1)
    ][1:]
    rows = []
    for i, dtype in enumerate(dtypes):
        hand, own = (median(turn[2 * i + k] for turn in turns) for k in (0, 1))
        values = by_hand(models[i], ids), by_hisvd(models[i], ids)
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "tokens_per_second": ids.numel() / own,
                "times_the_loop": median(turn[2 * i] / turn[2 * i + 1] for turn in turns),
                "perplexity": {"hisvd": values[1], "loop": values[0]},
            }
        )
        sys.stdout.write(
            f"{rows[-1]['dtype']}: {ids.numel() / own:.0f} tokens/s, "
            f"{rows[-1]['times_the_loop']:.2f} × the loop ({ids.numel() / hand:.0f}); perplexity "
            f"{values[1]:.4f} and {values[0]:.4f}\n"
        )
    gain = median(turn[1] / turn[3] for turn in turns)
    sys.stdout.write(f"bfloat16: {gain:.2f} × float32\n")
    if given.output:
        about = {"threads": given.threads, "windows": len(ids), "turns": given.turns}
        document = {**about, "dtypes": rows, "bfloat16_times_float32": gain}
        given.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
