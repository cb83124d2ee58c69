"""Speed of compressed models beside the dense one: tokens per second, as a ratio in one run.

All models are in memory together and take turns, so that whatever slows the machine slows all
alike; medians of some turns, after one that is not counted. Prefill is what ``generate`` does with
a prompt: it fills the cache, and makes logits of the last token alone; ``--logits all`` makes those
of every token, which takes the dense head as long for a compressed model. ``--decode N`` times N
tokens after the prompt instead. The loop is that of ``hisvd eval --efficiency``::

    python tests/benchmarks/inference.py DENSE COMPRESSED [COMPRESSED …] --threads 2
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hisvd_cli.evaluation.efficiency import take_turn
from hisvd_cli.modeling.whole_model import load_model


def parsed() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", type=Path, nargs="+", help="the dense model first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1024, help="of each prompt")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--logits", choices=["last", "all"], default="last")
    parser.add_argument("--decode", type=int, default=0, metavar="N")
    parser.add_argument("--output", type=Path, help="a .json file to which this run is added")
    parser.add_argument("--compile", action="store_true", help="the models' forward passes")
    return parser.parse_args()


def main() -> None:
    """Measure, and print a line for each model."""
    given = parsed()
    torch.set_num_threads(given.threads)
    cpu, dtype = torch.device("cpu"), getattr(torch, given.dtype)
    models: list[Any] = [load_model(folder, cpu, dtype) for folder in given.folders]
    if given.compile:
        for model in models:
            model.forward = torch.compile(model.forward)
    generator = torch.Generator().manual_seed(0)
    size = (given.batch, given.tokens)
    ids = torch.randint(0, models[0].config.vocab_size, size, generator=generator)

    def seconds(model: Any) -> float:
        turn = take_turn(model, ids, given.decode, keep=int(given.logits == "last"))
        return turn.seconds("decode" if given.decode else "prefill")

    turns = [[seconds(model) for model in models] for _ in range(given.turns + 1)][1:]
    made = given.batch * (given.decode or given.tokens)
    dense = median(turn[0] for turn in turns)
    rates = {}
    for i, folder in enumerate(given.folders):
        own = median(turn[i] for turn in turns)
        ratio = median(turn[0] / turn[i] for turn in turns)
        sys.stdout.write(
            f"{folder.name}: {made / own:.1f} tokens/s, {ratio:.2f} × the dense model "
            f"({made / dense:.1f})\n"
        )
        rates[folder.name] = {"tokens_per_second": made / own, "times_dense": ratio}
    if given.output:
        _add(given, rates)


def _add(given: argparse.Namespace, rates: dict[str, dict[str, float]]) -> None:
    """Add a run to the file of results; one of the same settings is replaced."""
    known = json.loads(given.output.read_text()) if given.output.is_file() else []
    keys = ("dtype", "logits", "batch", "tokens", "decode", "threads", "turns", "compile")
    how = {key: getattr(given, key) for key in keys}
    kept = [run for run in known if {key: run[key] for key in keys} != how]
    text = json.dumps([*kept, {**how, "models": rates}], indent=1)
    given.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
