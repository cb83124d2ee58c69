"""Prefill of compressed models beside the dense one: tokens per second, as a ratio in one run.

All models are in memory together and take turns, so that whatever slows the machine slows all
alike; medians of some turns, after one that is not counted::

    python tests/benchmarks/inference.py DENSE COMPRESSED [COMPRESSED …] --threads 2
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hisvd_cli.checkpoint import load_model


def seconds_of(model: Any, ids: Tensor) -> float:
    """Return how long one forward pass over ``ids`` ``[1, tokens]`` takes."""
    started = time.perf_counter()
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    return time.perf_counter() - started


def main() -> None:
    """Parse arguments, measure, print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", type=Path, nargs="+", help="the dense model first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cpu, dtype = torch.device("cpu"), getattr(torch, given.dtype)
    models = [load_model(folder, cpu, dtype) for folder in given.folders]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, models[0].config.vocab_size, (1, given.tokens), generator=generator)
    turns = [[seconds_of(model, ids) for model in models] for _ in range(given.turns + 1)][1:]
    dense = median(turn[0] for turn in turns)
    for i, folder in enumerate(given.folders):
        own = median(turn[i] for turn in turns)
        ratio = median(turn[0] / turn[i] for turn in turns)
        sys.stdout.write(
            f"{folder.name}: {given.tokens / own:.0f} tokens/s, {ratio:.2f} × the dense model "
            f"({given.tokens / dense:.0f})\n"
        )


if __name__ == "__main__":
    main()
