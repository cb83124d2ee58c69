"""Rows of conversations, and the text that a model's chat template makes of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

from hisvd_cli.utils.errors import DataError
from hisvd_cli.utils.library_errors import library_errors

if TYPE_CHECKING:
    from hisvd_cli.modeling.sources.source import Source

Message = Mapping[str, Any]
"""A turn: ``role`` and ``content``, perhaps more that a template reads."""

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""Roles of ShareGPT that templates call otherwise."""


def is_chat(row: Mapping[str, Any]) -> bool:
    """Tell whether a row holds a conversation rather than a text."""
    if isinstance(row.get("messages"), list) or isinstance(row.get("conversations"), list):
        return True
    return "prompt" in row and "completion" in row


def messages_of(row: Mapping[str, Any], name: str, number: int) -> list[dict[str, Any]]:
    """Return the conversation of a row.

    Args:
        row: with ``messages`` (role and content), ``conversations`` (ShareGPT: from and value), or
            ``prompt`` and ``completion``, each a text or messages.
        name: of the dataset.
        number: of the row, from 1 on.

    Raises:
        DataError: it holds none.
    """
    turns = row.get("messages") or row.get("conversations")
    if turns is None and "prompt" in row and "completion" in row:
        turns = _side(row["prompt"], "user") + _side(row["completion"], "assistant")
    found = [_message(turn) for turn in turns] if isinstance(turns, list) else []
    if not found or None in found:
        raise DataError(
            f"Row {number} of '{name}' holds no conversation.",
            "Each row needs messages with role and content, conversations with from and value, or "
            "prompt and completion.",
        )
    return [message for message in found if message is not None]


def _side(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _message(turn: Any) -> dict[str, Any] | None:
    if not isinstance(turn, dict):
        return None
    if "from" in turn and "value" in turn:
        turn = {"role": turn["from"], "content": turn["value"]}
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or not isinstance(content, str | list | None):
        return None
    # Parquet fills what a row lacks with None, which templates take for something that is there.
    kept = {key: value for key, value in turn.items() if value is not None}
    text = _joined(content) if isinstance(content, list) else content
    return {**kept, "role": _ROLES.get(role.lower(), role), "content": text or ""}


def _joined(parts: list[Any]) -> str | list[Any]:
    """Return the text of a message in parts, which templates for text alone do not take; parts of
    other types stay as they are."""
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    plain = all(not isinstance(part, dict) or part.get("type") == "text" for part in parts)
    return "".join(texts) if plain and all(isinstance(t, str) for t in texts) else parts


_DAY = datetime(2024, 7, 26)  # what the templates of Llama 3 fall back to
"""What templates are told that the day is: of the true one, each day would make another text."""


_TODAY = re.compile(r"""\bstrftime_now\(\s*(["'])([^"']*)\1\s*\)""")


def _undated(template: str) -> str:
    """Return a chat template that writes the same text on every day."""
    return _TODAY.sub(lambda asked: repr(_DAY.strftime(asked[2])), template)


def rendered(chats: Sequence[Sequence[Message]], name: str, source: Source) -> str:
    """Return the text of conversations as the model's chat template writes them, one after the
    other; the template runs in the sandbox of transformers.

    Raises:
        DataError: the tokenizer has no chat template, or it does not take a conversation.
    """
    tokenizer = source.tokenizer
    if not tokenizer.chat_template:
        raise DataError(
            f"'{name}' holds conversations, and the tokenizer of {source.name} has no chat "
            "template.",
            "Give a dataset with a text column, or a model with a chat template.",
        )
    texts = []
    for number, chat in enumerate(chats, 1):

        def refused(why: str, number: int = number) -> DataError:
            return DataError(
                f"The chat template of {source.name} does not take row {number} of '{name}': {why}",
                "Correct or remove that row.",
            )

        with library_errors(refused):
            template = _undated(tokenizer.get_chat_template())
            text = tokenizer.apply_chat_template(
                cast(Any, list(chat)), chat_template=template, tokenize=False
            )
            texts.append(str(text))
    return "".join(texts)
