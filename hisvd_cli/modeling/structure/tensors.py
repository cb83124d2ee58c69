"""Names and reads the tensors of a model on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hisvd_cli.modeling.sources.quantized_input import OWN
from hisvd_cli.modeling.sources.stored_names import naming_notes, refuse_unmerged, value_head
from hisvd_cli.modeling.structure.decoders import decoder_blocks
from hisvd_cli.modeling.structure.naming import find_naming
from hisvd_cli.modeling.structure.skeleton import build_meta_model
from hisvd_cli.modeling.structure.tied import shared_tensors, tied_names
from hisvd_cli.utils.errors import SourceError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hisvd_cli.modeling.sources.source import Source
    from hisvd_cli.utils.progress import Reporter


def tensor_names(model: PreTrainedModel, source: Source) -> dict[str, str]:
    """Return tensor name in the model → name on disk; tied tensors are listed once.

    Names on disk may lack the base model's prefix, if the model was saved without a head.

    Raises:
        SourceError: a tensor of the model is missing on disk.
        UnsupportedModelError: the weights contain an unmerged adapter, or a value head instead of
            a language model head.
    """
    wanted = list(model.state_dict())
    names = find_naming(model, source).names
    names |= {
        name: names[other]
        for name, other in shared_tensors(model).items()
        if name not in names and other in names
    }
    missing = dict.fromkeys(name for name in wanted if name not in names)
    _untie(model, source, names, missing)
    for name in missing:
        refuse_unmerged(source.name, source.weights)
        if found := value_head(source.weights):
            raise UnsupportedModelError(
                f"{source.name} has a value or classification head ({found}) and no {name}, so it "
                "is not a language model.",
                "Use the language model that it was trained from.",
            )
        raise SourceError(
            f"{source.name} lacks the tensor {name}, which its config requires.",
            "The files are incomplete or of another architecture: download the model again.",
        )
    return names


def own_head(model: PreTrainedModel, names: Mapping[str, str]) -> bool:
    """Return whether the output head is on disk although the config ties it to the embedding.

    transformers 4 ties it nevertheless, and ignores the stored tensor.
    """
    return (tied_names(model) or ("", ""))[0] in names


def tell_notes(source: Source, reporter: Reporter) -> None:
    """Warn about weights that are dequantized, merged, renamed or ignored.

    Raises:
        SourceError, UnsupportedModelError: the weights cannot be read.
    """
    for note in source.notes:
        reporter.warn(note)
    if source.quantization.get("quant_method") == OWN:
        return
    with suppress(SourceError, UnsupportedModelError):  # reported later by the command itself
        model = build_meta_model(source)
        prefix, layers = decoder_blocks(model)
        names, weights = tensor_names(model, source), source.weights
        by_rules = find_naming(model, source).by_rules
        made = (weights.derived[name].stored for name in names.values() if name in weights.derived)
        used = {*names.values(), *(stored for each in made for stored in each)}
        plain = {n: s for n, s in names.items() if n not in by_rules and s not in weights.derived}
        left = [name for name in weights if name not in used]
        base = model.base_model_prefix
        for note in naming_notes(plain, left, base, prefix, len(layers)):
            reporter.warn(note)


def read_tensor(
    source: Source, stored: str, name: str, expected: torch.Size, dtype: torch.dtype
) -> Tensor:
    """Read one tensor of a model and convert it to ``dtype``.

    Args:
        source: the model.
        stored: name on disk.
        name: name in the model.
        expected: shape in the model.
        dtype: target dtype; tensors that are not floating-point keep their own.

    Raises:
        SourceError: it cannot be read, or has the wrong shape.
        NumericalError: it is not finite.
    """
    tensor = source.weights.read(stored)
    check_shape(name, tensor.shape, expected)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def check_shape(name: str, found: Sequence[int], expected: Sequence[int]) -> None:
    """Raise SourceError if the shape of a tensor on disk differs from that of the config."""
    if tuple(found) != tuple(expected):
        raise SourceError(
            f"{name} has the shape {list(found)}, but the config requires {list(expected)}.",
            "Config and weights belong to different models: download both again.",
        )


def _untie(
    model: PreTrainedModel, source: Source, names: dict[str, str], missing: dict[str, None]
) -> None:
    """List a tied head only once, under the embedding's name, whichever of the two is on disk.

    As in transformers, a head on disk that differs from the embedding is kept as untied.
    """
    head, embedding = tied_names(model) or ("", "")
    if head in missing:
        del missing[head]
    elif embedding in missing:
        del missing[embedding]
        names[embedding] = names.pop(head)
    elif head in names and torch.equal(
        source.weights.read(names[head]), source.weights.read(names[embedding])
    ):
        del names[head]


def drop_weights(module: nn.Module, recurse: bool) -> None:
    """Move parameters to the meta device; buffers are kept, because they may not be on disk."""
    for part in module.modules() if recurse else [module]:
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
