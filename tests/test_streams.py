"""Standard streams that are closed, full, without a reader, or of few characters (issue 16, 4)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.cli_helpers import SCRIPT, environment, two_lines

PLAN = f"'{SCRIPT}' plan --model demo --ratio 0.6"
POSIX = pytest.mark.skipif(os.name != "posix", reason="asks a POSIX shell")


def shell(
    line: str, cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash; its exit code is that of the first command that fails."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=cwd,
        env=environment(env),
        capture_output=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
@POSIX
def test_a_reader_that_goes_away_early_gets_what_it_wants(tmp_path: Path) -> None:
    done = shell(f"{PLAN} | head -1", tmp_path)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1)
    assert b"Error" not in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr


@POSIX
@pytest.mark.parametrize(
    "closed",
    [
        ">&- 2>&-",
        *(pytest.param(c, marks=pytest.mark.slow) for c in (">&-", "2>&-", "<&- >&- 2>&-")),
    ],
)
def test_a_closed_stream_loses_nothing(closed: str, tmp_path: Path) -> None:
    done = shell(f"{PLAN} --output plan.json {closed}", tmp_path)
    assert (done.returncode, done.stderr) == (0, b"" if "2>&-" in closed else done.stderr)
    assert b"Traceback" not in done.stderr
    # What is printed goes nowhere, and so not into a file that was opened in its place.
    assert json.loads((tmp_path / "plan.json").read_bytes())["ratio"] == 0.6


@POSIX
@pytest.mark.parametrize(
    "command", ["inspect demo", "eval demo --windows 1 --seqlen 16", "plan --model demo"]
)
def test_a_result_that_is_only_printed_is_not_lost(command: str, tmp_path: Path) -> None:
    done = shell(f"'{SCRIPT}' {command} >&-", tmp_path)
    assert done.returncode == 1
    assert "stdout is closed" in two_lines(done.stderr.decode())[0]
    assert b"Evaluating" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="asks Linux")
@pytest.mark.parametrize("flag", ["", "--json", "--quiet"])
def test_a_full_stdout_is_told_after_the_work(flag: str, tmp_path: Path) -> None:
    done = shell(f"{PLAN} --output plan.json {flag} > /dev/full", tmp_path)
    assert done.returncode == 1
    message, hint = two_lines(done.stderr.decode())
    assert message == "Cannot write to stdout: No space left on device."
    assert hint.startswith("The command itself has completed")
    assert (tmp_path / "plan.json").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="asks Linux")
def test_a_full_stderr_stops_no_work(tmp_path: Path) -> None:
    done = shell(f"{PLAN} --verbose 2> /dev/full", tmp_path)
    assert done.returncode == 0
    assert b"whole model" in done.stdout


@POSIX
@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({"PYTHONIOENCODING": "ascii"}, marks=pytest.mark.slow),
        {"PYTHONIOENCODING": "cp1252"},
        pytest.param(
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, marks=pytest.mark.slow
        ),
    ],
    ids=["ascii", "windows", "C"],
)
@pytest.mark.parametrize("buffered", ["", pytest.param("1", marks=pytest.mark.slow)])
def test_characters_that_a_terminal_lacks_are_replaced(
    variables: dict[str, str], buffered: str, tmp_path: Path
) -> None:
    variables = {**variables, "PYTHONUNBUFFERED": buffered}
    done = shell(PLAN, tmp_path, variables)
    assert done.returncode == 0, done.stderr
    assert b"?" in done.stdout
    assert b"whole model" in done.stdout
    assert b"Internal error" not in done.stderr


@pytest.mark.slow
def test_a_system_without_posix_modules_imports_the_command_line() -> None:
    """Windows has none of these modules."""
    code = (
        "import sys\n"
        "import psutil, filelock, torch, transformers, typer.core, rich.progress\n"
        "for name in ('resource', 'fcntl', 'pwd', 'grp', 'termios'):\n"
        "    sys.modules[name] = None\n"
        "from pkgutil import walk_packages\n"
        "import hisvd_cli\n"
        "for module in walk_packages(hisvd_cli.__path__, 'hisvd_cli.'):\n"
        "    if not module.name.endswith(('__main__', 'modeling_hisvd', 'demo.train')):\n"
        "        __import__(module.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
