"""Running the command line in tests: in this process, and through the installed script."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging
from typer.testing import CliRunner, Result

from hisvd_cli.cli.app import app
from tests.models import random_text
from tests.processes import Command

SCRIPT = str(Path(sys.executable).with_name("hisvd"))
QUICK = ("--model", "demo", "--samples", "8", "--seqlen", "64")
"""The demo model, calibrated on as little as will do."""


def hisvd(*words: object, env: Mapping[str, str] | None = None) -> Result:
    """Run the command line in this process, and take back what it sets in libraries."""
    verbosity = logging.get_verbosity()
    variables = {"COLUMNS": None, **(env or {})}
    with warnings.catch_warnings():
        result = CliRunner().invoke(app, [str(word) for word in words], env=variables)
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
    return result


def succeed(*words: object, env: Mapping[str, str] | None = None) -> Result:
    """Run the command line, and fail the test where it fails."""
    result = hisvd(*words, env=env)
    assert result.exit_code == 0, result.output
    return result


def as_json(*words: object) -> Any:
    """Return the document that a command prints with ``--json``."""
    return json.loads(succeed(*words, "--json").stdout)


def fail(*words: object, code: int = 1, env: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Run what must fail in two lines on stderr; return them (what is wrong, what to do)."""
    result = hisvd(*words, env=env)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    return two_lines(result.stderr)


def two_lines(stderr: str) -> tuple[str, str]:
    """Return the message and the hint of an error; notes and warnings may stand above."""
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith(("Error: ", "Hint: "))]
    assert lines == stderr.splitlines()[-2:], stderr
    assert [line.split(":")[0] for line in lines] == ["Error", "Hint"]
    assert "Internal error" not in lines[0], lines
    return lines[0].removeprefix("Error: "), lines[1].removeprefix("Hint: ")


def script(
    *words: object,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a command in its own process: forked, or a fresh one, in which ``before`` runs first."""
    if before is None and not fresh:
        command = Command(words, cwd, environment(env))
        try:
            stdout, stderr = command.communicate()
        finally:
            command.kill()
        assert command.returncode is not None
        return subprocess.CompletedProcess([SCRIPT], command.returncode, stdout, stderr)
    return subprocess.run(
        [SCRIPT, *(str(word) for word in words)],
        cwd=cwd,
        env=environment(env),
        preexec_fn=before,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a script: one thread, so that sums are the same everywhere, and
    no columns, which the runner of the tests may have set."""
    inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return {**inherited, "OMP_NUM_THREADS": "1", **(extra or {})}


def digests(folder: Path) -> dict[str, str]:
    """Return every file below a folder, hidden ones too, with the sha256 of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def untouched(folder: Path, *words: object, code: int = 1) -> tuple[str, str]:
    """Run what must fail, and return its two lines; nothing below ``folder`` may change."""
    before = digests(folder)
    told = fail(*words, code=code)
    assert digests(folder) == before
    return told


def perplexity(target: Path, text: Path, stream: str) -> float:
    """Return the perplexity of a model on windows of 32 tokens."""
    options = ("--dataset", text, "--seqlen", 32, "--stream", stream)
    found: float = as_json("eval", target, *options)["results"][0]["perplexity"]
    return found


def text_file(folder: Path, words: int = 2000, seed: int = 0) -> Path:
    """Write a text that the tiny models' tokenizer knows."""
    path = folder / f"text-{seed}.txt"
    path.write_text(random_text(words, seed), encoding="utf-8")
    return path


@contextmanager
def running(*words: object, cwd: Path, env: Mapping[str, str] | None = None) -> Iterator[Command]:
    """Start a command in a process of its own, and kill it if it still runs at last."""
    process = Command(words, cwd, environment(env))
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def stop_at(process: Command, pattern: str, folder: Path, count: int, sig: int) -> str:
    """Send a signal as soon as ``count`` files match below ``folder``; return what stderr says.

    Fails the test where the run ends before it gets there.
    """
    deadline = time.monotonic() + 240
    while sum(1 for _ in folder.glob(pattern)) < count:
        assert process.poll() is None, f"ended too early: {process.communicate()[1]}"
        assert time.monotonic() < deadline, "never got there"
        time.sleep(0.001)
    process.send_signal(sig)
    return process.communicate(timeout=60)[1]
