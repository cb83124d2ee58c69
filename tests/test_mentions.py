"""Settings in messages: flags on the command line, keywords in Python."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hisvd_cli.cli.console import Console
from hisvd_cli.pipelines.api.names import in_python
from hisvd_cli.pipelines.config.mentions import in_flags
from hisvd_cli.pipelines.config.settings import SECTIONS
from hisvd_cli.utils.errors import HisvdError

CASES = [
    ("Lower `eval.windows`.", "Lower --windows.", "Lower 'windows'."),
    ("Set `plan.allocator` uniform.", "Set --allocator uniform.", "Set allocator='uniform'."),
    ("Use `to` hf or `to` dense.", "Use --to hf or --to dense.", "Use to='hf' or to='dense'."),
    ("`to` without `output`.", "--to without --output.", "'to' without 'output'."),
    ("`plan.ratio` 0.5 limits", "--ratio 0.5 limits", "ratio=0.5 limits"),
    ("Set `plan.allocator` to uniform", "Set --allocator to uniform", None),
    ("`output=a b.txt` is wrong.", "--output a b.txt is wrong.", "output='a b.txt' is wrong."),
    ("`model.device=cuda:1`.", "--device cuda:1.", "device='cuda:1'."),
    ("Add `no model.trust_remote_code`.", "Add --no-trust-remote-code.", None),
    ("Or `overwrite`.", "Or --overwrite.", "Or overwrite=True."),
    ("Name a `from` file.", "Name a --from file.", "Name a 'source' file."),
    ("`model.safetensors` and `x.y` stay.", None, None),
    ("Plain `words` stay.", None, None),
]


@pytest.mark.parametrize(("message", "flags", "keywords"), CASES)
def test_a_message_names_settings_as_its_reader_types_them(
    message: str, flags: str | None, keywords: str | None
) -> None:
    assert in_flags(message) == (flags or message)
    if keywords:
        assert in_python(message) == keywords


def test_the_opposite_of_a_setting() -> None:
    assert in_python("Add `no model.trust_remote_code`.") == "Add trust_remote_code=False."


def test_errors_and_notes_of_the_command_line_name_flags(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console(verbose=True)
    console.note("A `eval.windows` note.")
    console.suggest("A `eval.windows` suggestion.")
    console.warn("A `eval.windows` warning.")
    console.error(HisvdError("A `eval.windows` error.", "A `eval.windows` hint."))
    shown = capsys.readouterr().err
    assert shown.count("--windows") == 5
    assert "`" not in shown


PACKAGE = Path(__file__).parents[1] / "hisvd_cli"
NAMES_FLAGS = ("cli", "demo", "pipelines/config", "pipelines/api")
"""Rooms, and parts of them, where flags are declared, parsed or translated."""


def texts(path: Path) -> Iterator[str]:
    """Yield the string literals of a file, without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    expressions = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or id(node) in expressions:
            continue
        if isinstance(node.value, str):
            yield node.value


FILES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}


def test_only_the_command_line_names_flags() -> None:
    """But for whole commands, which a message recommends."""
    found = [
        f"{name}: {text}"
        for name, path in FILES.items()
        if not name.startswith(NAMES_FLAGS)
        for text in texts(path)
        if re.search(r"(?<![\w-])--[a-z]", text) and not re.search("hisvd [a-z]|torchrun", text)
    ]
    assert found == []


def test_every_setting_that_a_message_names_exists() -> None:
    mentions = {
        (name, section, key)
        for name, path in FILES.items()
        for text in texts(path)
        for section, key in re.findall(r"`(?:no )?([a-z]+)\.([a-z_]+)[`=]", text)
        if section in SECTIONS and (section, key) != ("plan", "json")  # a file
    }
    assert len(mentions) > 50
    unknown = {each for each in mentions if each[2] not in SECTIONS[each[1]].model_fields}
    assert unknown == set()
