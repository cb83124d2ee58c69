"""Tensors of a model that are stored once and used several times."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shared_tensors(model: PreTrainedModel) -> dict[str, str]:
    """Return tensor → tensor of an earlier block with the same values, which is stored once."""
    tied = getattr(model, "all_tied_weights_keys", None)
    outside = tied_names(model) or ("", "")
    pairs = dict(tied) if isinstance(tied, dict) else {}
    return {name: other for name, other in pairs.items() if (name, other) != outside}


def tied_names(model: PreTrainedModel) -> tuple[str, str] | None:
    """Return the names of an output head and of the embedding that it is tied to, if it is."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    configs = (model.config, model.config.get_text_config())
    tied = any(getattr(config, "tie_word_embeddings", False) for config in configs)
    if head is None or embedding is None or not tied:
        return None
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    return names[head], names[embedding]
