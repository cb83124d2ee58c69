"""Tables of the manual and the README, from the JSON files beside this one.

A page holds a table between two comments, ``<!-- table: NAME -->`` and ``<!-- end of table -->``.
This command writes every such table again; with ``--check`` it writes nothing, and exits with 1
where a page differs from what the files say::

    python -m tests.benchmarks.tables
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from hisvd_cli import __file__ as _package

HERE = Path(__file__).parent
MANUAL = Path(_package).parent / "docs"
README = MANUAL.parents[1] / "README.md"
DENSE_MB = 269
"""SmolLM2-135M in bfloat16; the benchmarks record the bytes of checkpoints alone."""
_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
_UNKNOWN = "–"


def read(name: str) -> Any:
    """Return what a benchmark wrote."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def render(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Return a perplexity: one decimal, or groups of three digits where it is large."""
    return f"{value:,.0f}".replace(",", " ") if value >= 1e4 else f"{value:.1f}"


def megabytes(size: float) -> str:
    return f"{size / 1e6:.0f}"


def find(rows: Iterable[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """Return the one row with these values."""
    (row,) = (r for r in rows if all(r[key] == value for key, value in wanted.items()))
    return row


def summary() -> str:
    """What the README shows first."""
    recovery, presets = read("recovery")["rows"], read("presets")
    speed = find(read("inference"), dtype="float32", logits="last")["models"]["piv"]["times_dense"]
    dense = number(presets["dense_perplexity"])
    lines = [["original", "1", dense, f"{DENSE_MB} MB", "1 ×"]]
    for label, step, ratio, times in (
        ("`best`", "best", 0.8, _UNKNOWN),
        ("`best`", "best", 0.6, f"{speed:.2f} ×"),
        ("then fine-tuned, 20 minutes", "distill", 0.6, _UNKNOWN),
        ("then stored in int8", "int8 gptq", 0.6, _UNKNOWN),
    ):
        row = find(recovery, preset=step, ratio=ratio)
        size = f"{megabytes(row['bytes'])} MB"
        lines.append([label, f"{ratio:g}", number(row["perplexity"]), size, times])
    return render(
        ["SmolLM2-135M-Instruct", "keep ratio", "perplexity", "weights", "prefill speed"], lines
    )


def smollm2() -> str:
    """The default allocator beside equal shares."""
    document = read("smollm2")
    ratios = [0.8, 0.6]
    labels = {"uniform": "`--allocator uniform`", "hisvd": "`--allocator hisvd` (default)"}
    lines = []
    for method, label in labels.items():
        cells = [find(document["rows"], method=method, ratio=ratio) for ratio in ratios]
        texts = [f"{number(c['perplexity'])} | {megabytes(c['bytes'])}" for c in cells]
        most = max(cell["peak_memory_bytes"] for cell in cells)
        lines.append([label, *texts, megabytes(most)])
    return render(["", "keep 0.8", "MB", "keep 0.6", "MB", "peak memory, MB"], lines)


def presets() -> str:
    """Perplexity of every preset, and the most seconds that any ratio took."""
    rows = read("presets")["rows"]
    ratios, stages = [0.9, 0.8, 0.6, 0.4], ("plan", "decompose", "write")
    lines = []
    for preset in dict.fromkeys(row["preset"] for row in rows):
        cells = [find(rows, preset=preset, ratio=ratio) for ratio in ratios]
        most = [max(cell["seconds"][stage] for cell in cells) for stage in stages]
        label = preset.replace(", plain pairs", " --storage pair")
        texts = [number(cell["perplexity"]) for cell in cells]
        lines.append([f"`{label}`", *texts, f"{most[0]:.0f}", f"{most[1]:.0f}", f"{most[2]:.1f}"])
    head = [f"keep {ratio:g}" for ratio in ratios]
    return render(["`--preset`", *head, "plan, s", "decompose, s", "write, s"], lines)


def eight_windows() -> str:
    """Divergence and its intervals."""
    document = read("eight_windows")
    models = [document["baseline"], *document["evaluations"]]
    return render(
        ["model", "perplexity", "bits per byte", "KL, nats per token", "top-1 agreement"],
        [[f"`{each['model']}`", *_figures(each["results"][0])] for each in models],
    )


def _figures(result: dict[str, Any]) -> list[str]:
    digits = {"perplexity": 1, "bits_per_byte": 3, "kl": 3, "agreement": 3}
    texts = []
    for key, places in digits.items():
        if result[key] is None:
            texts.append(_UNKNOWN)
            continue
        low, high = result["intervals"][key]
        texts.append(f"{result[key]:.{places}f} ({low:.{places}f} to {high:.{places}f})")
    return texts


def recovery() -> str:
    """What updates, fine-tuning and quantization make of the preset best."""
    rows, ratios = read("recovery")["rows"], [0.8, 0.6]
    labels = {
        "best": "`--preset best`",
        "update": "with `--update propagated`",
        "distill": "`best`, then `--recover distill`, 20 minutes",
        "int8 gptq": "then `convert --quantize int8 --quantize-method gptq`",
        "int4 gptq": "or `convert --quantize int4 --quantize-method gptq`",
    }
    lines = []
    for step, label in labels.items():
        cells = [find(rows, preset=step, ratio=ratio) for ratio in ratios]
        texts = [[number(c["perplexity"]), megabytes(c["bytes"]), *_cost(c)] for c in cells]
        lines.append([label, *(text for group in texts for text in group)])
    head = [part for r in ratios for part in (f"keep {r:g}", "MB", "s", "peak memory, GB")]
    return render(["", *head], lines)


def _cost(row: dict[str, Any]) -> list[str]:
    seconds, peak = row["seconds"], row["peak_memory_bytes"]
    return [
        _UNKNOWN if seconds is None else f"{seconds:.0f}",
        _UNKNOWN if peak is None else f"{peak / 1e9:.1f}",
    ]


def calibration_text() -> str:
    """How much text the preset best needs, and which."""
    lines = [
        [
            row["text"],
            f"{row['samples']} × {row['seqlen']}",
            *(number(row["perplexity"][ratio]) for ratio in ("0.8", "0.6")),
        ]
        for row in read("calibration_text")
    ]
    return render(["text", "tokens", "keep 0.8", "keep 0.6"], lines)


def inference() -> str:
    """Prefill beside the dense model."""
    names = ("pair", "pair16", "piv")
    lines = []
    for run in read("inference"):
        times = [f"{run['models'][name]['times_dense']:.2f} ×" for name in names]
        dense = f"{run['models']['dense']['tokens_per_second']:.0f}"
        lines.append([f"{run['dtype']}, {run['logits']}", dense, *times])
    head = ["", "dense, tokens/s", "plain pairs", "pairs, `--multiple-of 16`", "pivoted"]
    return render(head, lines)


def decompose() -> str:
    """Seconds of a decomposition, and how many times as fast as Cholesky and SVD."""
    cases = read("decompose")["cases"]
    ratios, lines = [0.8, 0.6, 0.4], []
    for shape in dict.fromkeys(tuple(case["shape"]) for case in cases):
        texts = []
        for ratio in ratios:
            took = find(cases, shape=list(shape), ratio=ratio)["seconds"]
            times = took["cholesky + svd"] / took["hisvd"]
            texts.append(f"{took['hisvd']:.2f} s, {times:.1f} ×")
        lines.append([f"{shape[0]} × {shape[1]}", *texts])
    return render(["shape", *(f"keep {ratio:g}" for ratio in ratios)], lines)


def evaluation() -> str:
    """The evaluation loop beside an independent one."""
    lines = [
        [
            run["dtype"],
            f"{run['tokens_per_second']:.0f}",
            f"{run['times_the_loop']:.2f} ×",
            f"{run['perplexity']['hisvd']:.4f}",
            f"{run['perplexity']['loop']:.4f}",
        ]
        for run in read("evaluation")["dtypes"]
    ]
    head = ["dtype", "tokens/s", "speed against the loop", "perplexity", "perplexity of the loop"]
    return render(head, lines)


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "smollm2": smollm2,
    "presets": presets,
    "eight-windows": eight_windows,
    "recovery": recovery,
    "calibration-text": calibration_text,
    "inference": inference,
    "decompose": decompose,
    "evaluation": evaluation,
}


def pages() -> list[Path]:
    """Return the README and the pages of the manual."""
    return [README, *sorted(MANUAL.glob("*.md"))]


def refreshed(text: str) -> str:
    """Return a page with its tables written again. Raises KeyError for an unknown table."""
    return _TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def main() -> None:
    """Write or check all pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if stale")
    check = parser.parse_args().check
    stale = []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if refreshed(text) != text:
            stale.append(path.name)
            if not check:
                path.write_text(refreshed(text), encoding="utf-8")
    sys.stdout.write(f"{'Stale' if check else 'Written'}: {', '.join(stale) or 'no page'}\n")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
