"""Escapes untrusted text for terminals, Markdown and spreadsheets.

Names of tensors, models and paths may contain terminal control sequences, Markdown or spreadsheet
formulas. Each function serves one kind of output and is called where that output is written.
"""

from __future__ import annotations

import re

_COLOUR = re.compile(r"(\x1b\[|\x9b)[\d;]*m")
# Control characters (C0, DEL, C1) and characters that reorder or hide text: bidirectional
# controls, invisible characters, line separators. Joiners (200C, 200D) are kept.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
# Punctuation with a meaning in Markdown or HTML; an underscore only at the edge of a word.
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])")
_FORMULA = ("=", "+", "-", "@", "\t", "\n", "＝", "＋", "－", "＠")
"""First characters of a formula, including their full-width forms."""


def printable(text: str) -> str:
    """Return text for a terminal: without control characters except line breaks and tabs.

    The visible rest of a control sequence is kept, so that nothing is hidden.
    """
    return _CONTROLS.sub("", _COLOUR.sub("", text))


def markdown_text(value: object) -> str:
    """Return a value escaped as one line of Markdown, also valid in a table cell."""
    return _MARKDOWN.sub(r"\\\g<0>", _one_line(value))


def markdown_code(value: object, in_table: bool = False) -> str:
    """Return a value as a Markdown code span.

    Args:
        value: what to show.
        in_table: escape vertical bars, which end a table cell even in a code span.
    """
    text = _one_line(value)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    span = f"{fence}{space}{text}{space}{fence}"
    return span.replace("|", r"\|") if in_table else span


def spreadsheet_cell(value: object) -> object:
    """Return a CSV cell; text that looks like a formula gets a leading apostrophe. Numbers are
    returned unchanged."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


def _one_line(value: object) -> str:
    return " ".join(printable(str(value)).split())
