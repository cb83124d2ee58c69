"""How one run gains from several processes: seconds of calibration and compression, and ratios.

A random llama (bfloat16) is calibrated on random words and compressed by 1, 2, … processes of
``torchrun``, in turns; seconds are those that ``compress --json`` reports, so without the start of
Python. Threads are set for each process, so that one process does not take the cores of two::

    python tests/benchmarks/scaling.py OUT --processes 1 2 --threads 1
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
import transformers

from tests.models import VOCABULARY, random_text, randomize, save_tokenizer

STAGES = ["calibrate", "plan", "decompose", "write"]


def make_model(folder: Path, width: int, blocks: int) -> None:
    """Write a random llama with grouped-query attention, and its tokenizer."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=int(width * 8 / 3) // 64 * 64,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        max_position_embeddings=2048,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)


def seconds_of(home: Path, processes: int, threads: int, words: list[str]) -> dict[str, float]:
    """Return the seconds of each stage of one run with a cache of its own."""
    for name in ("cache", "out"):
        shutil.rmtree(home / name, ignore_errors=True)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HISVD_CACHE": str(home / "cache")}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "hisvd_cli", "compress", *words, "--json", "--quiet"],
        env=env,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout)["seconds"]
    return found


def main() -> None:
    """Parse arguments, measure in turns, print a line for each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    given = parser.parse_args()
    home = given.out.resolve()
    shutil.rmtree(home / "model", ignore_errors=True)
    home.mkdir(parents=True, exist_ok=True)
    make_model(home / "model", given.width, given.blocks)
    text = home / "text.txt"
    text.write_text(random_text(2 * given.samples * given.seqlen), encoding="utf-8")
    words = [
        *("--model", str(home / "model"), "--dataset", str(text), "--output", str(home / "out")),
        *("--samples", str(given.samples), "--seqlen", str(given.seqlen), "--ratio", "0.6"),
        *("--dtype", "float32", "--no-evaluate"),
    ]
    taken: dict[int, list[dict[str, float]]] = {n: [] for n in given.processes}
    for _ in range(given.turns):
        for processes, runs in taken.items():
            runs.append(seconds_of(home, processes, given.threads, words))
    base = taken[given.processes[0]]
    for processes, runs in taken.items():
        parts = [
            f"{stage} {median(r[stage] for r in runs):.1f} s "
            f"({median(b[stage] / r[stage] for b, r in zip(base, runs, strict=True)):.2f} ×)"
            for stage in STAGES
        ]
        whole = median(sum(b.values()) / sum(r.values()) for b, r in zip(base, runs, strict=True))
        sys.stdout.write(f"{processes} processes: {', '.join(parts)}; all {whole:.2f} ×\n")


if __name__ == "__main__":
    main()
