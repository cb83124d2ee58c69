"""One tiny model and what is made of it, loaded with plain transformers."""

from __future__ import annotations

import copy
import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests.architectures.factors import multiply_out
from tests.architectures.overrides import RUN
from tests.architectures.registry import Architecture

TOLERANCE = 1e-4
AUTO = {"causal": "AutoModelForCausalLM", "image-text": "AutoModelForImageTextToText"}
_MASKED = 1e30


class Case:
    """One saved model, and what is made of it in a folder."""

    def __init__(self, each: Architecture, original: Path, work: Path) -> None:
        self.each = each
        self.original = original
        self.work = work
        self.perplexity = math.nan
        self.tokens = torch.randint(1, 2000, (2, 24), generator=torch.Generator().manual_seed(1))

    @property
    def checkpoint(self) -> Path:
        """The folder that ``compress`` writes."""
        return self.work / "checkpoint"

    @cached_property
    def loaded(self) -> PreTrainedModel:
        """The checkpoint in plain transformers."""
        return load_whole(self.each, self.checkpoint)

    @cached_property
    def whole(self) -> PreTrainedModel:
        """The original in plain transformers."""
        return load_whole(self.each, self.original)

    @cached_property
    def dense(self) -> PreTrainedModel:
        """The original with the factors multiplied out."""
        model = copy.deepcopy(self.whole)
        multiply_out(model, self.checkpoint)
        return model

    @cached_property
    def plan(self) -> dict[str, Any]:
        """The plan of the checkpoint."""
        found: dict[str, Any] = json.loads((self.checkpoint / "plan.json").read_text("utf-8"))
        return found

    def logits(self, model: PreTrainedModel) -> Tensor:
        """Return the logits of a model ``[2, 24, vocabulary]``."""
        with torch.no_grad():
            found: Tensor = self.part(model)(input_ids=self.tokens).logits
        return found

    def part(self, model: PreTrainedModel) -> Any:
        """Return what of a model is run."""
        name = RUN.get(self.each.model_type)
        return getattr(model, name) if name else model


def load_whole(each: Architecture, folder: Path) -> PreTrainedModel:
    """Load a model in float32 with plain transformers.

    Raises:
        AssertionError: a tensor is missing, unexpected or of another shape.
    """
    auto = getattr(transformers, AUTO[each.kind])
    model, found = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, found[what]))
        assert not names, f"{len(names)} {what.replace('_', ' ')}, such as {names[0]}."
    assert not found.get("error_msgs"), found["error_msgs"]
    result: PreTrainedModel = model.eval()
    return result


def compare(found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raise AssertionError if tensors differ by more than a part of the largest value."""
    visible = wanted.abs() < _MASKED  # logits of image tokens may be masked
    assert bool(found[visible].isfinite().all()), "Some logits are not finite."
    assert torch.equal(visible, found.abs() < _MASKED), "Other logits are masked."
    error = (found - wanted)[visible].abs().max() / wanted[visible].abs().max()
    assert error <= tolerance, f"The logits differ by {error:.1e} of the largest."
