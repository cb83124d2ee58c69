"""Settings in messages: flags on the command line, keywords in Python."""

from __future__ import annotations

import pytest

from hisvd_cli.cli.console import Console
from hisvd_cli.pipelines.api.names import in_python
from hisvd_cli.pipelines.config.mentions import in_flags
from hisvd_cli.utils.errors import HisvdError

CASES = [
    ("Lower `eval.windows`.", "Lower --windows.", "Lower windows."),
    ("Set `plan.allocator` uniform.", "Set --allocator uniform.", "Set allocator uniform."),
    ("Add `no model.trust_remote_code`.", "Add --no-trust-remote-code.", None),
    ("Or `overwrite`.", "Or --overwrite.", "Or overwrite."),
    ("Name a `from` file.", "Name a --from file.", "Name a source file."),
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
