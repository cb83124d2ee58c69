"""Conversations, and their text by the chat template of a model."""

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
"""A message with ``role`` and ``content``, and optional fields for the template."""

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""Role names of ShareGPT and the names that templates use."""


def is_chat(row: Mapping[str, Any]) -> bool:
    """Return whether a row contains a conversation, which may be malformed."""
    if "messages" in row or "conversations" in row:
        return True
    return "prompt" in row and "completion" in row


def messages_of(row: Mapping[str, Any], name: str, number: int) -> list[dict[str, Any]]:
    """Return the conversation of a row.

    Args:
        row: has ``messages`` (role and content), ``conversations`` (ShareGPT: from and value), or
            ``prompt`` and ``completion``, each a text or messages.
        name: name of the dataset.
        number: number of the row, from 1.

    Raises:
        DataError: the row contains no conversation.
    """
    turns = row.get("messages") or row.get("conversations")
    if turns is None and "prompt" in row and "completion" in row:
        turns = _side(row["prompt"], "user") + _side(row["completion"], "assistant")
    found = [_message(turn) for turn in turns] if isinstance(turns, list) else []
    if not found or None in found:
        raise DataError(
            f"Row {number} of '{name}' contains no conversation.",
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
    # Parquet fills missing fields with None, which templates would treat as present.
    kept = {key: value for key, value in turn.items() if value is not None}
    text = _joined(content) if isinstance(content, list) else content
    return {**kept, "role": _ROLES.get(role.lower(), role), "content": text or ""}


def _joined(parts: list[Any]) -> str | list[Any]:
    """Return the joined text of a message in parts, since many templates accept only text; messages
    with parts of other types are returned unchanged."""
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    plain = all(not isinstance(part, dict) or part.get("type") == "text" for part in parts)
    known = [text for text in texts if isinstance(text, str)]
    return "".join(known) if plain and len(known) == len(texts) else parts


_DAY = datetime(2024, 7, 26)  # the default of the Llama 3 templates
"""The date for chat templates; with the current date, the text would change every day."""
_TODAY = re.compile(r"""\bstrftime_now\(\s*(["'])([^"']*)\1\s*\)""")


def _undated(template: str) -> str:
    """Return a chat template with a fixed date in place of the current one."""
    return _TODAY.sub(lambda match: repr(_DAY.strftime(match[2])), template)


def rendered(chats: Sequence[Sequence[Message]], name: str, source: Source) -> str:
    """Return the concatenated conversations in the format of the model's chat template.

    The template runs in the sandbox of transformers.

    Raises:
        DataError: the tokenizer has no chat template, or the template rejects a conversation.
    """
    tokenizer = source.tokenizer
    if not tokenizer.chat_template:
        raise DataError(
            f"'{name}' contains conversations, but the tokenizer of {source.name} has no chat "
            "template.",
            "Use a dataset with a text column, or a model with a chat template.",
        )
    texts = []
    for number, chat in enumerate(chats, 1):

        def refused(why: str, number: int = number) -> DataError:
            return DataError(
                f"The chat template of {source.name} rejects row {number} of '{name}': {why}",
                "Correct or remove that row.",
            )

        with library_errors(refused):
            template = _undated(tokenizer.get_chat_template())
            text = tokenizer.apply_chat_template(
                cast(Any, list(chat)), chat_template=template, tokenize=False
            )
            texts.append(str(text))
    return "".join(texts)
