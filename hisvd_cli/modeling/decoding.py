"""Runs the decoder and the output head of a causal language model separately."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hisvd_cli.modeling.structure.decoders import decoder_of, language_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def logits_from_states(model: PreTrainedModel, ids: Tensor, states: Tensor) -> Tensor:
    """Return the logits ``[B, L, V]`` for decoder output ``[B, L, d]``.

    The model's own forward pass runs with the decoder replaced, so that output head, bias, scale
    and soft cap are all applied. The decoder's weights are not read.

    Args:
        model: the whole model.
        ids: tokens ``[B, L]``, on the device of ``states``.
        states: the decoder's output for them, after the final norm.
    """
    output = _output_class()(last_hidden_state=states)

    def stub(*_args: Any, **_kwargs: Any) -> Any:
        return output

    decoder = decoder_of(model)
    decoder.forward = stub
    try:
        logits: Tensor = language_model(model)(input_ids=ids, use_cache=False).logits
    finally:
        del decoder.forward
    return logits


@cache
def _output_class() -> Any:
    """Return the class of a decoder's output; fields that only some decoders have are None."""
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    @dataclass
    class Output(BaseModelOutputWithPastAndCrossAttentions):
        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return Output


class TwoParts:
    """Runs the decoder and the output head of a model separately, with gradients.

    Args:
        model: the whole model.
        dtype: the dtype of matrix products; parameters may be wider.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.model = model
        self._dtype = dtype
        self._device = model.device
        self._decoder = decoder_of(model)

    def states(self, ids: Tensor) -> Tensor:
        """Return the decoder's output ``[B, L, d]`` for tokens ``[B, L]``."""
        with self._precision():
            output = self._decoder(input_ids=ids.to(self._device), use_cache=False)
        states: Tensor = output[0]
        return states

    def head(self, states: Tensor) -> Tensor:
        """Return the logits ``[T, V]`` for decoder output ``[T, d]``."""
        ids = torch.zeros((1, len(states)), dtype=torch.long, device=states.device)
        with self._precision():
            return logits_from_states(self.model, ids, states[None])[0]

    def _precision(self) -> torch.autocast:
        narrow = self._dtype != torch.float32
        # Training in float16 needs loss scaling, which is not implemented: bfloat16 replaces it.
        return torch.autocast(self._device.type, torch.bfloat16, enabled=narrow)
