"""Lists the language model classes of the installed transformers, and which are decoders."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from tests.architectures.overrides import NO_TEXT_DECODER

Kind = Literal["causal", "image-text"]


@dataclass(frozen=True, order=True)
class Architecture:
    """A model class as a configuration names it.

    Attributes:
        model_type: ``model_type`` of the configuration, such as ``qwen3_moe``.
        class_name: the class that transformers loads it with.
        kind: the automatic class that loads it: ``AutoModelForCausalLM`` or
            ``AutoModelForImageTextToText``.
    """

    model_type: str
    class_name: str
    kind: Kind


@cache
def architectures() -> dict[str, Architecture]:
    """Return type → class, sorted by type.

    A type of both kinds stands as ``image-text``: its causal class is the text model alone, which
    transformers lists under a type of its own, such as ``qwen3_5_text``.
    """
    both: tuple[tuple[Kind, Any], ...] = (
        ("causal", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("image-text", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    )
    found = {}
    for kind, mapping in both:
        for model_type, class_name in mapping.items():
            found[model_type] = Architecture(model_type, class_name, kind)
    return dict(sorted(found.items()))


def config_class(model_type: str) -> type[PreTrainedConfig]:
    """Return the configuration class of a type."""
    found: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
    return found


def out_of_scope(each: Architecture) -> str | None:
    """Return why a class is not a decoder, one sentence, or None if it is one."""
    if each.model_type in NO_TEXT_DECODER:
        return NO_TEXT_DECODER[each.model_type]
    if getattr(config_class(each.model_type), "is_encoder_decoder", False):
        return "An encoder-decoder model."
    if each.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "An encoder: transformers also lists it for masked language modelling."
    return None
