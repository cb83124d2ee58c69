"""Token ids that a model has embeddings for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hisvd_cli.utils.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from hisvd_cli.modeling.sources.source import Source


def known_ids(ids: Tensor, source: Source) -> Tensor:
    """Return token ids, of any shape, that all have an embedding.

    A tokenizer may have more ids than the model as long as a text needs none of them.

    Raises:
        DataError: one has none.
    """
    rows = int(source.config.get_text_config().vocab_size)
    if not ids.numel() or int(ids.max()) < rows:
        return ids
    largest = int(ids.max())
    token = source.tokenizer.convert_ids_to_tokens(largest)
    raise DataError(
        f"The tokenizer of {source.name}, with {len(source.tokenizer)} tokens, gives the id "
        f"{largest} ({token!r}), but the model has {rows} embeddings.",
        "Put the tokenizer beside the weights that the model was trained with.",
    )
