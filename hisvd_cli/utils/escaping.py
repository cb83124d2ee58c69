"""Texts that came from somebody else's file, made harmless for whatever shows them.

A name of a tensor, a model or a path may hold anything: sequences that move a terminal's cursor or
rename its window, Markdown, a formula of a spreadsheet. Each function here serves one kind of
output, and is called where that output is written.
"""

from __future__ import annotations

import re

_COLOUR = re.compile(r"(\x1b\[|\x9b)[\d;]*m")
# Control characters (C0, DEL, C1), and those that reorder or hide text: bidirectional controls,
# invisible ones, line separators. The joiners of scripts and emoji (200C, 200D) stay.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
# Punctuation by which Markdown and HTML begin something, an underscore only at the edge of a word.
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])")
_FORMULA = ("=", "+", "-", "@", "\t", "\n", "＝", "＋", "－", "＠")
"""How a formula begins, in the wide forms of East Asian spreadsheets too."""


def printable(text: str) -> str:
    """Return a text without control characters but line breaks and tabs, for a terminal.

    What a control sequence held beside its control character stays, so that nothing is hidden.
    """
    return _CONTROLS.sub("", _COLOUR.sub("", text))


def markdown_text(value: object) -> str:
    """Return a value as one line of Markdown that shows it as it is, in a table too."""
    return _MARKDOWN.sub(r"\\\g<0>", _one_line(value))


def markdown_code(value: object, in_table: bool = False) -> str:
    """Return a value as a code span, in which nothing but its end has a meaning; in a table, a bar
    has one as well."""
    text = _one_line(value)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    span = f"{fence}{space}{text}{space}{fence}"
    return span.replace("|", r"\|") if in_table else span


def spreadsheet_cell(value: object) -> object:
    """Return a cell of CSV; a text that a spreadsheet would take for a formula gets an apostrophe
    before it, which makes it a text. Numbers stay numbers."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


def _one_line(value: object) -> str:
    return " ".join(printable(str(value)).split())
