"""Flags made from the settings, and the help that shows them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from rich.text import Text
from typer.core import TyperGroup
from typer.main import get_command

from hisvd_cli.cli.app import app
from hisvd_cli.cli.options import option
from hisvd_cli.pipelines.config.settings import SECTIONS, choices_of, flag_of, kind_of
from tests.cli_helpers import as_json, environment, hisvd, succeed

COMMANDS = {
    "calibrate": ["model", "calibration"],
    "plan": ["model", "calibration", "plan"],
    "compress": ["model", "calibration", "plan", "compress"],
    "eval": ["eval"],
    "inspect": [],
    "convert": [],
}
COMMON = [
    "--help-all",
    "--profile",
    "--set",
    "--show-profile",
    "--json",
    "--quiet",
    "--verbose",
    "--help",
]


def help_of(*words: str, flag: str = "--help-all") -> str:
    return succeed(*words, flag, env={"COLUMNS": "80"}).stdout


def flags_of(sections: list[str]) -> list[str]:
    return [flag_of(section, key) for section in sections for key in SECTIONS[section].model_fields]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_flag_whole_at_80_columns(command: str) -> None:
    text = help_of(command)
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
    shown = set(re.findall(r"(?<![\w-])--[a-z-]+", text))
    assert shown >= {*flags_of(COMMANDS[command]), *COMMON}


def test_no_help_text_loses_an_extra() -> None:
    """Typer reads help as markup, in which the brackets of ``hisvd[eval]`` would be a style."""
    root = get_command(app)
    assert isinstance(root, TyperGroup)
    texts = [root.help, root.epilog]
    for command in root.commands.values():
        texts += [command.help, *(getattr(parameter, "help", "") for parameter in command.params)]
    told = [text for text in texts if text]
    assert len(told) > 100
    for text in told:
        assert Text.from_markup(text).plain == text.replace(r"\[", "[")
    shown = succeed("eval", "--help", env={"COLUMNS": "300"}).stdout
    assert "pip install 'hisvd[eval]'" in shown
    assert option("--x", text="see [gguf]").help == r"see \[gguf]"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_brief_and_says_where_the_rest_is(command: str) -> None:
    text = help_of(command, flag="--help")
    shown = set(re.findall(r"^│ (--[a-z-]+)", text, re.MULTILINE))
    every = set(re.findall(r"^│ (--[a-z-]+)", help_of(command), re.MULTILINE))
    assert shown < every
    assert len(shown) <= 18
    assert len(text.splitlines()) <= 2 * 40  # two screens
    assert "<bool>" not in text, "a placeholder of an option that takes no value"
    assert f"All {len(every)} options: hisvd {command} --help-all" in text
    assert hisvd(command, "--help").stdout == text, "--help-all changed what --help shows"


def test_help_shows_the_defaults() -> None:
    text = " ".join(re.sub(r"[│\s]+", " ", help_of("compress")).split())
    for section in COMMANDS["compress"]:
        for key, field in SECTIONS[section].model_fields.items():
            if field.default not in (None, "", []) and kind_of(section, key) is not bool:
                values = field.default if isinstance(field.default, list) else [field.default]
                assert f"(default {', '.join(map(str, values))})" in text, key
    assert "(default off)" in text


def test_every_choice_is_named_in_the_help() -> None:
    for section, model in SECTIONS.items():
        for key, field in model.model_fields.items():
            kind = kind_of(section, key)
            choices = get_args(kind) if get_origin(kind) is Literal else ()
            assert all(word in str(field.description) for word in choices), key


def test_every_method_is_named_in_the_help() -> None:
    for section, key in (("plan", "allocator"), ("compress", "decomposer")):
        text = str(SECTIONS[section].model_fields[key].description)
        assert choices_of(section, key)
        assert all(word in text for word in choices_of(section, key)), key


@pytest.mark.parametrize("command", ["plan", "compress"])
def test_knobs_of_single_methods_stand_below_the_rest(command: str) -> None:
    panels = re.findall(r"^╭─ (.+?) ─", help_of(command), re.MULTILINE)
    assert [p for p in panels if p.endswith(" options")] == [
        *["Allocator options"],
        *(["Correction options", "Decomposer options"] if command == "compress" else []),
    ]
    assert panels.index("Allocator options") > panels.index("Calibration")
    assert panels[-1] == "Settings and output"


def test_placeholders_say_what_is_named() -> None:
    text = help_of("compress")
    for flag, shown in (("calibration", "PATH"), ("max-memory", "SIZE"), ("scratch", "PATH")):
        assert re.search(rf"--{flag} +{shown} ", text)


def test_help_speaks_of_several_values_where_they_are_accepted() -> None:
    several = {"plan": {"ratio", "allocator"}, "compress": {"ratio", "preset"}}
    for command, flags in several.items():
        text = " ".join(re.sub(r"[│\s]+", " ", help_of(command)).split())
        for flag in ("ratio", "preset", "allocator"):
            placeholder = "X" if flag == "ratio" else "NAME"
            told = re.split(r" --[a-z]", text.partition(f" --{flag} {placeholder} ")[2])[0]
            assert ("(repeatable)" in told) == (flag in flags), (command, flag)
        assert "accepts several" not in text
        assert "compares several" not in text


def test_top_help_is_short() -> None:
    text = help_of(flag="--help")
    assert "<bool>" not in text
    assert len(text.splitlines()) <= 40
    assert all(command in text for command in COMMANDS)


def test_flags_reach_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = as_json(
        *("compress", "--show-profile", "--model", "m", "--trust-remote-code", "--samples", 3),
        *("--ratio", 0.5, "--ratio", 0.6, "--exclude", "a", "--no-evaluate", "--windows", 2),
        *("--calibration", "folder", "--alpha", 1, "--set", "eval.batch=7"),
    )["settings"]
    assert settings["model"]["name"] == "m"
    assert settings["model"]["trust_remote_code"] is True
    assert settings["calibration"]["samples"] == 3
    assert settings["calibration"]["path"] == "folder"
    assert settings["plan"]["ratio"] == [0.5, 0.6]
    assert settings["plan"]["exclude"] == ["a"]
    assert settings["plan"]["include"] == []
    assert settings["plan"]["alpha"] == 1
    assert settings["compress"]["evaluate"] is False
    assert settings["eval"]["windows"] == 2
    assert settings["eval"]["batch"] == 7


def test_methods_reach_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    document = as_json(
        *("plan", "--show-profile", "--preset", "rsvd-llm", "--gradients"),
        *("--allocator", "lems", "--allocator", "uniform", "--sensitivity-ratios", 0.5),
    )
    settings, origins = document["settings"], document["origins"]
    assert settings["plan"]["allocator"] == ["lems", "uniform"]
    assert settings["plan"]["sensitivity_ratios"] == [0.5]
    assert settings["calibration"]["gradients"] is True
    assert settings["calibration"]["weight_gradients"] is False
    assert settings["compress"]["decomposer"] == "randomized"
    assert origins["plan.allocator"] == "--allocator"
    assert origins["compress.decomposer"] == "preset rsvd-llm"


def test_switches_that_are_not_given_leave_the_profile_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.toml").write_text(
        "[model]\ntrust_remote_code = true\n[compress]\nevaluate = true\n[plan]\ninclude = ['x']\n"
    )
    settings = as_json("compress", "--profile", "own.toml", "--show-profile")["settings"]
    assert settings["model"]["trust_remote_code"] is True
    assert settings["compress"]["evaluate"] is True
    assert settings["plan"]["include"] == ["x"]


def test_show_profile_does_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = hisvd("compress", "--model", "absent/model", "--show-profile")
    assert result.exit_code == 0
    assert 'name = "absent/model"  # --model' in result.stdout
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("plan --preset s", ["svd-llm", "svd-llm-v2", "swift-svd"]),
        ("plan --allocator s", ["svdllm-v2", "swift"]),
        ("compress --decomposer f", ["fwsvd", "fisher"]),
        ("compress --weighting f", ["fwsvd", "fisher"]),
        ("plan --rank-method s", ["stable"]),
    ],
)
def test_values_are_completed_without_torch(words: str, expected: list[str]) -> None:
    code = (
        "import sys\n"
        "from hisvd_cli.cli.app import app\n"
        "try: app(prog_name='hisvd')\n"
        "finally: sys.stderr.write(' '.join({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    line = f"hisvd {words}"
    variables = {"_HISVD_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(variables),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.split(), done.stderr) == (expected, "")
