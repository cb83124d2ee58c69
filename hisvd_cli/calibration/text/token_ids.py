"""Checks that a model has embeddings for token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hisvd_cli.utils.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from hisvd_cli.modeling.sources.source import Source


def known_ids(ids: Tensor, source: Source) -> Tensor:
    """Return token ids of any shape unchanged.

    A tokenizer may have more ids than the model has embeddings, if a text does not use them.

    Raises:
        DataError: the model has no embedding for one of the ids.
    """
    rows = int(source.config.get_text_config().vocab_size)
    if not ids.numel() or int(ids.max()) < rows:
        return ids
    largest = int(ids.max())
    token = source.tokenizer.convert_ids_to_tokens(largest)
    raise DataError(
        f"The tokenizer of {source.name} ({len(source.tokenizer)} tokens) returns id {largest} "
        f"({token!r}), but the model has {rows} embeddings.",
        "Use the tokenizer that the model was trained with.",
    )
