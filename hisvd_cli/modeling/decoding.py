"""A causal language model split into its decoder and its head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as Given


class TwoParts:
    """Runs the decoder and the head of a model separately, with gradients.

    Args:
        model: the whole model.
        dtype: precision of products; parameters may have a wider dtype.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.model = model
        self._dtype = dtype
        self._device = model.device
        self._decoder: nn.Module = model.get_decoder()

    def states(self, ids: Tensor) -> Tensor:
        """Return the decoder's output ``[B, L, d]`` for tokens ``[B, L]``."""
        with self._precision():
            output = self._decoder(input_ids=ids.to(self._device), use_cache=False)
        states: Tensor = output[0]
        return states

    def head(self, states: Tensor) -> Tensor:
        """Return the logits ``[T, V]`` for decoder outputs ``[T, d]``, through the model's own
        forward pass, including bias, scale and soft cap."""

        def stub(*_args: Any, **_kwargs: Any) -> Given:
            return Given(last_hidden_state=states[None])

        ids = torch.zeros((1, len(states)), dtype=torch.long, device=states.device)
        self._decoder.forward = stub
        try:
            with self._precision():
                logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        finally:
            del self._decoder.forward
        return logits[0]

    def _precision(self) -> torch.autocast:
        narrow = self._dtype != torch.float32
        # bfloat16 also replaces float16, which would need loss scaling.
        return torch.autocast(self._device.type, torch.bfloat16, enabled=narrow)
