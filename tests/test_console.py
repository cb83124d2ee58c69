"""The one place that prints: what goes to stdout, what to stderr, and in which form."""

from __future__ import annotations

import json
import os
import sys

import pytest
from rich.table import Table

from hisvd_cli.cli.console import Console
from hisvd_cli.utils import progress as module
from hisvd_cli.utils.errors import HisvdError

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


def test_results_by_mode(capsys: Captured) -> None:
    for console, expected in (
        (Console(), "table\n"),
        (Console(quiet=True), "line\n"),
        (Console(as_json=True), '{\n  "a": "\\u00e9"\n}\n'),
        (Console(as_json=True, quiet=True), '{\n  "a": "\\u00e9"\n}\n'),
    ):
        console.show("table")
        console.result({"a": "é"}, "line")
        out, err = capsys.readouterr()
        assert (out, err) == (expected, "")


def test_json_refuses_what_json_cannot_say() -> None:
    with pytest.raises(ValueError, match="JSON"):
        Console(as_json=True).result({"a": float("nan")}, "")


def test_what_others_print_goes_to_stderr(capsys: Captured) -> None:
    console = Console(as_json=True)
    with console.alone():
        print("a library's chatter")  # noqa: T201
        console.result({}, "")
    out, err = capsys.readouterr()
    assert json.loads(out) == {}
    assert err == "a library's chatter\n"


def test_notes_warnings_and_the_next_command(capsys: Captured) -> None:
    for console, expected in (
        (Console(), "Warning: w\nNext: n\n"),
        (Console(verbose=True), "o\nWarning: w\nNext: n\n"),
        (Console(quiet=True), "Warning: w\n"),
        (Console(as_json=True), "Warning: w\n"),
    ):
        console.note("o")
        console.warn("w")
        console.next_command("n")
        assert capsys.readouterr() == ("", expected)


def test_an_error_is_a_line_per_problem_and_a_hint(capsys: Captured) -> None:
    Console().error(HisvdError("one\ntwo", "do this"))
    assert capsys.readouterr() == ("", "Error: one\nError: two\nHint: do this\n")
    Console().error(HisvdError("one"))
    assert capsys.readouterr() == ("", "Error: one\n")


def test_the_traceback_of_a_cause(capsys: Captured) -> None:
    try:
        raise KeyError("deep")
    except KeyError as error:
        Console().error(HisvdError("one"), error)
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("KeyError: 'deep'\nError: one\n")


def test_texts_are_printed_as_they_are(capsys: Captured) -> None:
    odd = "[red]x[/] :smile: [1, 2] 'q' " + "long " * 60
    console = Console()
    console.show(odd)
    console.warn(odd)
    console.error(HisvdError(odd, odd))
    out, err = capsys.readouterr()
    assert out == f"{odd}\n"
    assert err == f"Warning: {odd}\nError: {odd}\nHint: {odd}\n"


def test_width(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert Console().width > 200  # a file has no columns
    table = Table("c")
    table.add_row("x" * 150)
    Console().show(table)
    assert "x" * 150 in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "60")
    assert Console().width == 60


def test_a_stage_in_a_log_file(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    with Console().stage("Work [on] it", 2) as step:
        step()
        assert capsys.readouterr().err == ""
        step()
    assert capsys.readouterr().err.startswith("Work [on] it: 2/2 in ")
    monkeypatch.setattr(module, "_LOG_SECONDS", 0.0)
    with Console().stage("Work", 2) as step:
        step()
        assert capsys.readouterr().err.startswith("Work: 1/2 in ")
    with Console(quiet=True).stage("Work", 1) as step:
        step()
    assert capsys.readouterr() == ("", "")


def test_a_stage_in_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Console().stage("Work [on] it", 3) as step:
        step()
        step()
    out, err = capsys.readouterr()
    assert out == ""
    assert "Work [on] it" in err
    assert "2/3" in err
    with Console(quiet=True).stage("Work", 1) as step:
        step()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("plain", [True, False])
def test_colour(plain: bool, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    if plain:
        monkeypatch.setenv("NO_COLOR", "1")
    else:
        monkeypatch.delenv("NO_COLOR", raising=False)
    Console().error(HisvdError("one"))
    assert ("\x1b[1;31m" in capsys.readouterr().err) is not plain


def test_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stdout:  # noqa: PTH123  (a descriptor, no path)
        monkeypatch.setattr(sys, "stdout", stdout)
        console = Console()
        with pytest.raises(BrokenPipeError):
            console.show("x")
        with pytest.raises(BrokenPipeError):
            console.text("x")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # or closing it would fail as well
