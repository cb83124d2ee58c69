"""``python -m tests.architectures``: check every decoder of the installed transformers."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter


def main() -> None:
    """Run what the command line names, print a line for each, and write the results if asked."""
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=main.__doc__)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="types to check, such as llama")
    parser.add_argument("--processes", type=int, default=1, help="how many run at a time")
    parser.add_argument("--write", action="store_true", help="write coverage.json")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries are imported
    from tests.architectures import coverage
    from tests.architectures.processes import run_all
    from tests.architectures.registry import architectures

    known = architectures()
    if unknown := sorted({*(given.only or ())} - known.keys()):
        parser.error(f"transformers has no language model class for {', '.join(unknown)}.")
    results = {name: each for name, each in coverage.read().items() if name in known}
    counts: Counter[str] = Counter()
    start = time.monotonic()
    for each, result in run_all([known[n] for n in given.only or known], given.processes):
        results[each.model_type] = result
        counts[result.state] += 1
        why = ": ".join(filter(None, (result.step, result.sentence))) or result.best
        share = f"{result.covered:4.0%}" if result.covered else "    "
        sys.stdout.write(f"{each.model_type:26} {result.state:12} {share} {why}\n")
        sys.stdout.flush()
        if given.write:
            coverage.write(results)
    counted = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    sys.stdout.write(f"{counted}; {time.monotonic() - start:.0f} s\n")


if __name__ == "__main__":
    main()
