"""SIGKILL at random moments of every long command: what the same command makes of it afterwards.

Each command is run once undisturbed. Then, again and again in a folder, a cache and a temporary
folder of its own, it is killed at a random moment, and run to its end: its output must have the
same bytes, no temporary file may be left anywhere, and nothing else may have changed. Commands are
forked from a process that has imported everything, so that kills fall into their work; states for a
resumed run are written all the time, not once a minute::

    python -m tests.benchmarks.kills OUT --kills 20

Linux and macOS. Prints a table, and exits with 1 where a run left anything but what it should.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import accelerate  # noqa: F401
import scipy.linalg  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

import hisvd_cli
from hisvd_cli.calibration import calibrate, gradients
from hisvd_cli.cli import app
from hisvd_cli.evaluation import measurement
from hisvd_cli.finetuning.trainer import Schedule
from hisvd_cli.pipelines.recovering import training
from hisvd_cli.utils.files.owners import TAG
from tests.cli_helpers import digests

TEXT = ("--samples", "4", "--seqlen", "32")
MAKING = ("compress", "--model", "demo", *TEXT, "--ratio", "0.6", "--no-evaluate")
RECOVERY = ("--recover", "distill", "--recover-seqlen", "64", "--recover-samples", "16")
COMMANDS: dict[str, tuple[str, ...]] = {
    "calibrate": ("calibrate", "--model", "demo", *TEXT, "--gradients", "--calibration", "made"),
    "compress": (*MAKING, "--overwrite", "--max-shard-size", "0.001", "--output", "made"),
    "eval": ("eval", "low", "low.pt", "--baseline", "demo", "--csv", "made.csv"),
    "convert to dense": ("convert", "low.pt", "--to", "dense", "--output", "made", "--overwrite"),
    "convert to pt": ("convert", "low", "--to", "pt", "--output", "made.pt", "--overwrite"),
    "convert --quantize": ("convert", "low.pt", "--quantize", "int4", "--output", "made"),
    "compress --quantize": (*MAKING, "--quantize", "int8", "--overwrite", "--output", "made"),
    "distill": ("compress", "--from", "low", *RECOVERY, "--output", "made", "--overwrite"),
    "compress .pt": (*MAKING, "--overwrite", "--output", "made.pt"),
    "compress, 2 stages": (*MAKING, "--stages", "2", "--overwrite", "--output", "made"),
}
MORE: dict[str, tuple[str, ...]] = {
    "eval": ("--windows", "8", "--seqlen", "64"),
    "convert --quantize": ("--overwrite",),
    "distill": ("--recover-tokens", "1500"),
}
GIVEN = ("low", "low.pt")  # in the folder of every run
TEMPORARY = (
    f"**/*{TAG}*",
    "**/.*.hisvd.*",
    "**/.*.tmp",
    "**/.*.lock",
    "**/.*.partial",
    "**/.*.key",
)


@dataclass
class Row:
    """What kills did to one command.

    Attributes:
        command: its name.
        seconds: an undisturbed run.
        kills: runs that were killed; others ended before.
        faults: what was wrong, by trial.
    """

    command: str
    seconds: float
    kills: int = 0
    faults: list[str] = field(default_factory=list)


def hurry() -> None:
    """Import everything, and have states for a resumed run written after every step."""
    for module in walk_packages(hisvd_cli.__path__, "hisvd_cli."):
        if not module.name.endswith(("__main__", "modeling_hisvd", "train")):
            import_module(module.name)  # once, and not in every process
    for function in (calibrate.calibrate, gradients.measure_gradients):
        defaults = function.__kwdefaults__ or {}
        defaults["state_seconds"] = 0.0
    measurement.SAVE_SECONDS = 0.0
    vars(training)["Schedule"] = partial(Schedule, state_seconds=0.2)


def start(words: Iterable[str], home: Path) -> int:
    """Run a command in a process of its own; return its number."""
    process = os.fork()
    if process:
        return process
    log = os.open(home / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    os.chdir(home / "work")
    os.environ |= {"HISVD_CACHE": str(home / "cache"), "TMPDIR": str(home / "temporary")}
    tempfile.tempdir = None
    sys.argv = ["hisvd", *words]
    code = 1
    try:
        app.main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def run(words: Iterable[str], home: Path) -> tuple[int, float]:
    """Run a command to its end; return its exit code and the seconds that it took."""
    started = time.monotonic()
    _, status = os.waitpid(start(words, home), 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - started


def killed(words: Iterable[str], home: Path, seconds: float) -> bool:
    """Run a command, and kill it after so long; tell whether it was still running."""
    process = start(words, home)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)  # one that has ended waits to be asked for its code
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status)


def prepare(home: Path, given: Path | None) -> None:
    """Make the folders of one trial, with what the commands are given."""
    for name in ("work", "cache", "temporary"):
        (home / name).mkdir(parents=True)
    if given:
        shutil.copytree(given / "work", home / "work", dirs_exist_ok=True)


def made(home: Path) -> dict[str, str]:
    """Return the digests of what a command made, and of what was there before it."""
    return digests(home / "work")


def left(home: Path) -> list[str]:
    """Return what a command should have removed."""
    found = {path for pattern in TEMPORARY for path in home.glob(pattern)}
    found |= set((home / "cache").glob("scratch/*"))
    found |= set((home / "temporary").iterdir())
    found |= {path for path in (home / "work").iterdir() if path.name.startswith(".")}
    return sorted(str(path.relative_to(home)) for path in found)


def trial(row: Row, words: Iterable[str], home: Path, given: Path, wanted: dict[str, str]) -> None:
    """Kill one run, run it again, and note in the row what is wrong then."""
    prepare(home, given)
    after = random.uniform(0.02, 1.0) * row.seconds
    row.kills += killed(words, home, after)
    code, _ = run(words, home)
    wrong = []
    if code:
        wrong.append(f"exit code {code}: {(home / 'log').read_text().strip().splitlines()[-2:]}")
    found = made(home)
    different = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
    if different:
        wrong.append(f"other bytes: {', '.join(different[:4])}")
    if more := left(home):
        wrong.append(f"left: {', '.join(more[:4])}")
    if wrong:
        row.faults.append(f"killed after {after:.2f} s: {'; '.join(wrong)}")
    else:
        shutil.rmtree(home)


def measure(name: str, output: Path, kills: int) -> Row:
    """Return the row of a command, killed so many times."""
    words = (*COMMANDS[name], *MORE.get(name, ()))
    given, home = output / "given", output / name.replace(" ", "-") / "undisturbed"
    prepare(home, given)
    code, seconds = run(words, home)
    if code:
        raise RuntimeError((home / "log").read_text())
    row, wanted = Row(name, seconds), made(home)
    if more := left(home):
        row.faults.append(f"undisturbed: left {', '.join(more[:4])}")
    number = 0
    while row.kills < kills and number < 3 * kills:
        number += 1
        trial(row, words, home.with_name(f"trial-{number}"), given, wanted)
    return row


def table(rows: Iterable[Row]) -> str:
    """Return the rows as text."""
    lines = [f"{'command':22} {'seconds':>8} {'kills':>6} {'faults':>7}"]
    for row in rows:
        lines.append(f"{row.command:22} {row.seconds:8.2f} {row.kills:6} {len(row.faults):7}")
        lines += [f"  {fault}" for fault in row.faults]
    return "\n".join(lines)


def main() -> int:
    """Parse arguments, kill, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path, help="an empty folder; trials with faults stay there")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(COMMANDS), choices=list(COMMANDS))
    asked = parser.parse_args()
    random.seed(asked.seed)
    torch.set_num_threads(1)
    hurry()
    output = asked.output.absolute()
    given = output / "given"
    prepare(given, None)
    for kind in GIVEN:
        code, _ = run((*MAKING, "--output", kind), given)
        if code:
            raise RuntimeError((given / "log").read_text())
    rows = []
    for name in asked.only:
        rows.append(measure(name, output, asked.kills))
        sys.stderr.write(table(rows[-1:]) + "\n")
    sys.stdout.write(table(rows) + "\n")
    return 1 if any(row.faults for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
