"""README and manual: links, commands, flags and profiles that they name, and their tables."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli
import typer

import hisvd_cli as hisvd
from hisvd_cli.allocation.methods import ALLOCATORS
from hisvd_cli.cli.app import app
from hisvd_cli.compression.methods import DECOMPOSERS
from hisvd_cli.pipelines.config.commands import SETTINGS
from hisvd_cli.pipelines.config.presets import PRESETS
from hisvd_cli.pipelines.config.resolution import resolve
from hisvd_cli.pipelines.config.settings import SECTIONS
from tests.benchmarks.tables import MANUAL, README, TABLES, pages, refreshed
from tests.cli_helpers import environment
from tests.test_imports import ROOMS

REPOSITORY = Path(__file__).parents[1]
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

NAMES = [path.name for path in pages()]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_ENDINGS = {"json", "pt", "safetensors", "toml"}
_OTHER_PROGRAMS = {"pip", "python", "pytest", "lm_eval", "ruff"}
CI = ("pip install -e '.[test]' && .venv/bin/pytest", ".venv/bin/hisvd compress")
"""Commands that ``.ci/run`` looks for in the README."""


def page(name: str) -> str:
    return next(p for p in pages() if p.name == name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks in a language."""
    return [code for name, code in _FENCE.findall(text) if name == language]


def spans(text: str) -> list[str]:
    """Return the inline code."""
    return [" ".join(code.split()) for code in _SPAN.findall(_FENCE.sub("", text))]


def anchors(text: str) -> set[str]:
    """Return the anchors of all headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words behind ``hisvd`` of every command in code blocks and inline code."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    lines += [code for code in spans(text) if code.startswith("hisvd ")]
    for part in (part for line in lines for part in line.split("&&")):
        words = shlex.split(part, comments=True)
        for i, word in enumerate(words):
            if word.rpartition("/")[2] in {"hisvd", "hisvd_cli"}:
                yield words[i + 1 :]
                break


def parse(words: list[str]) -> dict[str, Any]:
    """Parse a command without running it; return its parameters. Raises Typer's errors."""
    group: Any = typer.main.get_command(app)
    if words[0].startswith("--"):
        assert words[0] in {o for p in group.params for o in p.opts}, words
        return {}
    assert words[0] in group.commands, words
    if words[1:] in ([], ["--help"]):  # a command is only named
        return {}
    parameters: dict[str, Any] = group.commands[words[0]].make_context(words[0], words[1:]).params
    return parameters


def known_flags() -> set[str]:
    group: Any = typer.main.get_command(app)
    every = [group, *group.commands.values()]
    shown = {o for c in every for p in c.params for o in (*p.opts, *p.secondary_opts)}
    return {*shown, "--help", "--install-completion"}


def test_every_page_is_in_the_index_and_the_readme() -> None:
    for name in NAMES[1:]:
        assert f"hisvd_cli/docs/{name}" in page("README.md")
        assert name == "index.md" or f"({name})" in page("index.md")


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    path = next(p for p in pages() if p.name == name)
    for target in _LINK.findall(_FENCE.sub("", page(name))):
        assert "://" not in target, target
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.is_file(), target
        assert name == "README.md" or found.is_relative_to(MANUAL), "the wheel has no such file"
        assert not anchor or anchor in anchors(found.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "hisvd.toml").touch()
    monkeypatch.setenv("HOME", str(here))
    for words in commands(page(name)):
        given = parse(words)
        settings: dict[tuple[str, str], Any] = {}
        for key, value in given.items():
            section, _, setting = key.partition("__")
            if section in SECTIONS and value not in (None, [], ()):
                settings[section, setting] = value
        resolve(settings, overrides=list(given.get("overrides") or []))


@pytest.mark.parametrize("name", NAMES)
def test_flags_exist(name: str) -> None:
    known = known_flags()
    for code in spans(page(name)):
        words = code.split()
        if words[0] in _OTHER_PROGRAMS or words[0].startswith("tests/"):
            continue
        named = {word for word in words if re.fullmatch(r"--\w[\w-]*", word)}
        assert named <= known, code


@pytest.mark.parametrize("name", NAMES)
def test_settings_exist(name: str, here: Path) -> None:
    """Profiles in code blocks, and the names of sections."""
    text = page(name)
    for code in blocks(text, "toml"):
        document = tomli.loads(code)
        if set(document) != {"project"}:
            (here / "hisvd.toml").write_text(code)
            resolve({}, here / "hisvd.toml")
    for code in spans(text):
        if found := re.fullmatch(r"\[([a-z]{3,})\]", code):
            assert found[1] in SECTIONS, code
        if found := re.fullmatch(r"(\w+)\.(\w+)", code):
            section, key = found.groups()
            named = section in SECTIONS and key not in _ENDINGS
            assert not named or key in SECTIONS[section].model_fields, code


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_fresh(name: str) -> None:
    assert refreshed(page(name)) == page(name), "Run: python -m tests.benchmarks.tables"


def test_every_table_is_shown() -> None:
    shown = re.findall("<!-- table: (.*) -->", "".join(map(page, NAMES)))
    assert sorted(shown) == sorted(TABLES)


def test_the_readme_is_short_and_has_the_commands_of_ci() -> None:
    text = page("README.md")
    assert 700 <= len(text.split()) <= 950
    assert not README.is_relative_to(MANUAL)
    for command in CI:
        assert text.count(command) == 1


def test_the_python_examples_name_keywords() -> None:
    """The test below runs them; this one is fast."""
    calls = [
        node
        for code in blocks(page("python.md"), "python")
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("hisvd.")
    ]
    named = [ast.unparse(call.func).removeprefix("hisvd.") for call in calls]
    assert {*named} == {*SETTINGS}
    for name, call in zip(named, calls, strict=True):
        known = inspect.signature(getattr(hisvd, name)).parameters
        assert {keyword.arg for keyword in call.keywords} <= {*known}


@pytest.mark.slow
def test_the_python_examples_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "hisvd.toml").write_text('[plan]\nallocator = "uniform"\nratio = 0.5\n')
    names: dict[str, Any] = {}
    exec("\n".join(blocks(page("python.md"), "python")), names)
    assert "ratio=1.5 must be above 0 and at most 1.\n" in capsys.readouterr().out
    assert (names["quiet"].ratio, names["quiet"].data.allocator) == (0.7, "uniform")
    assert {path.name for path in here.iterdir()} == {
        *("hisvd.toml", "plan.json", "demo-0.6", "demo-tuned", "demo-int8"),
    }


def test_the_results_in_the_python_page_exist() -> None:
    table = page("python.md").partition("## Results")[2].partition("## ")[0]
    rows = [re.findall(r"`(\w+)[^`]*`", line) for line in table.splitlines() if "| `" in line]
    assert len(rows) == 5
    for row in rows:
        (kind,) = [word for word in row if word in hisvd.__all__ and word[0].isupper()]
        result = getattr(hisvd, kind)
        for name in row[row.index(kind) + 1 :]:
            assert name in result.__dataclass_fields__ or hasattr(result, name), (kind, name)


def test_every_method_is_described() -> None:
    heads = anchors(page("methods.md"))
    assert {*ALLOCATORS.names(), *DECOMPOSERS.names()} <= heads
    assert all(f"| `{name}`" in page("methods.md") for name in PRESETS)


def test_the_layout_is_that_of_the_imports() -> None:
    table = page("contributing.md").partition("## Layout")[2].partition("## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == ROOMS


@pytest.mark.slow
def test_the_example_of_a_method_works(tmp_path: Path) -> None:
    """In a copy of the product: its file, its test, and what the commands print."""
    shutil.copytree(REPOSITORY / "hisvd_cli", tmp_path / "hisvd_cli")
    (tmp_path / "tests").mkdir()
    for name in (
        "pyproject.toml",
        *(f"tests/{n}.py" for n in ("__init__", "conftest", "allocation")),
    ):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    text = page("contributing.md")
    named = re.findall(r"^`(\S+\.py)`:\n\n```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(named) == len(blocks(text, "python")) == 2
    for path, code in named:
        (tmp_path / path).write_text(code, encoding="utf-8")
    (session,) = blocks(text, "console")
    for part in session.removeprefix("$ ").split("\n$ "):
        command, _, wanted = part.partition("\n")
        shown = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=environment({"PYTHONPATH": str(tmp_path), "PATH": PATH, "COLUMNS": "80"}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert told(shown.stdout) == told(wanted), shown.stderr


def told(output: str) -> list[str]:
    """Return the lines of an output, without what differs from run to run."""
    return [re.sub(r" in [\d.]+s$", "", line.rstrip()) for line in output.rstrip().splitlines()]
