"""README and manual: links, commands, flags and profiles that they name, and their tables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli
import typer

from hisvd_cli.allocation import methods
from hisvd_cli.allocation.methods import ALLOCATORS
from hisvd_cli.cli.app import app
from hisvd_cli.compression.methods import DECOMPOSERS
from hisvd_cli.pipelines.config.presets import PRESETS
from hisvd_cli.pipelines.config.resolution import resolve
from hisvd_cli.pipelines.config.settings import SECTIONS
from hisvd_cli.utils.registry import Registry
from tests.allocation import make_budget, make_spectra
from tests.benchmarks.tables import MANUAL, README, TABLES, pages, refreshed
from tests.test_imports import ROOMS

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
    assert 700 <= len(text.split()) <= 1100
    assert not README.is_relative_to(MANUAL)
    for command in CI:
        assert text.count(command) == 1


def test_every_method_is_described() -> None:
    heads = anchors(page("methods.md"))
    assert {*ALLOCATORS.names(), *DECOMPOSERS.names()} <= heads
    assert all(f"| `{name}`" in page("methods.md") for name in PRESETS)


def test_the_layout_is_that_of_the_imports() -> None:
    table = page("contributing.md").partition("## Layout")[2].partition("## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == ROOMS


def test_the_example_of_an_allocator_works(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Registry[Any] = Registry("allocator", "hisvd_cli.cli.commands", "hisvd.tests")
    monkeypatch.setattr(methods, "ALLOCATORS", registry)
    (code,) = blocks(page("contributing.md"), "python")
    exec(code, {"__name__": "example"})
    given = make_spectra(layers=3, seed=0)
    budget = make_budget(given, 0.6)
    ranks = registry.get("root")(given, budget).ranks
    assert 0 < budget.spent(ranks) <= budget.parameters
