"""Builds models without weights on the meta device, and maps tensor names to those on disk."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hisvd_cli.modeling.linearize import linearize
from hisvd_cli.modeling.naming import find_naming
from hisvd_cli.modeling.sources.quantized_input import OWN, check_config
from hisvd_cli.modeling.sources.source import read_config
from hisvd_cli.modeling.sources.stored_names import (
    naming_notes,
    refuse_unmerged,
    value_head,
)
from hisvd_cli.utils.errors import SourceError, UnsupportedModelError, reason
from hisvd_cli.utils.library_errors import library_errors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from hisvd_cli.modeling.sources.source import Source
    from hisvd_cli.utils.progress import Reporter

SUPPORTED = "Supported: llama, mistral, qwen2, qwen3, opt, gemma, phi and similar decoder models."


def build_meta_model(
    source: Source,
    dtype: torch.dtype = torch.float32,
    compressed: bool = False,
    working: bool = True,
) -> PreTrainedModel:
    """Build the dense model without weights; rotary buffers are initialized.

    Args:
        source: the model.
        dtype: dtype of the parameters.
        compressed: accept a compressed checkpoint, and build the equivalent dense model.
        working: replace other forms of linear layers by ``nn.Linear``, see
            :func:`hisvd_cli.modeling.linearize.linearize`.

    Raises:
        UnsupportedModelError: not a decoder-only language model, or already compressed.
    """
    from accelerate import init_empty_weights

    _check_precision(source, compressed)
    if getattr(source.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{source.name} ('{source.config.model_type}') is an encoder-decoder model.",
            SUPPORTED,
        )
    with library_errors(partial(_not_built, source)), init_empty_weights():
        model: PreTrainedModel = auto_class(source.config).from_config(
            copy.deepcopy(source.config),  # from_config writes the dtype into the config
            dtype=dtype,
            trust_remote_code=source.runs_code,
        )
    model.eval()
    if working:
        prepare(model)
    return model


def prepare(model: PreTrainedModel) -> None:
    """Replace other forms of linear layers in the decoder blocks by ``nn.Linear``, in place.

    A model without decoder blocks is left as it is.
    """
    with suppress(UnsupportedModelError):
        linearize(decoder_blocks(model)[1])
        for name in {n for pair in shared_tensors(model).items() for n in pair}:
            vars(model.get_submodule(name.rpartition(".")[0]))["shared"] = True
        for config in (model.config, model.config.get_text_config()):
            config._experts_implementation = "eager"  # the others bypass linear layers


def auto_class(config: PretrainedConfig) -> Any:
    """Return the class of transformers that loads a model of this config.

    A multimodal model is loaded whole if its config names that architecture.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MULTIMODAL,
    )

    named = set(config.architectures or ())
    causal, multimodal = CAUSAL.get(config.model_type), MULTIMODAL.get(config.model_type)
    if multimodal and (causal is None or (multimodal in named and causal not in named)):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _not_built(source: Source, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{source.name} ('{source.config.model_type}') cannot be built as a causal language "
        f"model: {why}",
        SUPPORTED,
    )


def build_stored_model(source: Source, dtype: torch.dtype, working: bool = True) -> PreTrainedModel:
    """Build a model without weights as stored on disk: with low-rank layers if it is compressed.

    Args:
        source: the model.
        dtype: dtype of the parameters.
        working: as for :func:`build_meta_model`.

    Raises:
        UnsupportedModelError: see :func:`build_meta_model`.
        SourceError: the ranks in its config do not match the model.
    """
    model = build_meta_model(source, dtype, compressed=True, working=False)
    if source.quantization.get("quant_method") == "hisvd":
        from hisvd_cli.modeling.layers.transformers_plugin import HiSVDConfig, replace_linears

        try:
            replace_linears(model, HiSVDConfig(**source.quantization))
        except (ValueError, TypeError) as error:
            raise SourceError(
                f"{source.name} cannot be built: {reason(error)}",
                f"Run: hisvd inspect {source.name}",
            ) from error
    if working:
        prepare(model)
    return model


def _check_precision(source: Source, compressed: bool) -> None:
    if source.quantization.get("quant_method") == OWN and not compressed:
        raise UnsupportedModelError(
            f"{source.name} is already compressed.",
            "Use the original model; 'hisvd inspect' shows the base model of a checkpoint.",
        )
    check_config(source.name, source.folder, read_config(source.folder))


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the name and the module list of the decoder blocks.

    It is the list of the text decoder with as many blocks as the config says and the most
    parameters, whatever its name.

    Raises:
        UnsupportedModelError: there is none.
    """
    decoder = text_decoder(model)
    within = next((f"{name}." for name, m in model.named_modules() if m is decoder), "")
    within = within.removeprefix(".")
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.startswith(within) and _are_blocks(module)
    ]
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of decoder blocks.", SUPPORTED
        )
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", 0)

    def rank(found: tuple[str, nn.ModuleList]) -> tuple[bool, int]:
        layers = found[1]
        return len(layers) == wanted, sum(p.numel() for p in layers.parameters())

    return max(lists, key=rank)


def _are_blocks(layers: nn.ModuleList) -> bool:
    """Return whether a list holds blocks, which consist of several layers."""
    return len(layers) > 0 and all(any(True for _ in layer.children()) for layer in layers)


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """Return the text decoder according to transformers; the model itself if it names none."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not isinstance(found, nn.Module):
        return model
    has_blocks = any(isinstance(module, nn.ModuleList) for module in found.modules())
    return found if has_blocks else model


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return the innermost module that runs the decoder blocks on tokens, or else what transformers
    calls the decoder."""
    try:
        name, _ = decoder_blocks(model)
    except UnsupportedModelError:
        return text_decoder(model)
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if "input_ids" in inspect.signature(module.forward).parameters:
            return module
    return model


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


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the innermost part of a model that maps tokens to logits: the text model of some
    multimodal models, otherwise the model itself."""
    from transformers import PreTrainedModel

    decoder, found = decoder_of(model), model
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for part in parts:
        inner = any(module is decoder for module in part.modules())
        if inner and part.get_output_embeddings() is not None:
            found = part
    return found


def shared_tensors(model: PreTrainedModel) -> dict[str, str]:
    """Return tensor → tensor of an earlier block with the same values, which is stored once."""
    tied = getattr(model, "all_tied_weights_keys", None)
    outside = tied_names(model) or ("", "")
    pairs = dict(tied) if isinstance(tied, dict) else {}
    return {name: other for name, other in pairs.items() if (name, other) != outside}


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
        names, base = tensor_names(model, source), model.base_model_prefix
        for note in naming_notes(names, source.weights, base, prefix, len(layers)):
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


def tied_names(model: PreTrainedModel) -> tuple[str, str] | None:
    """Return the names of an output head and of the embedding that it is tied to, if it is."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    configs = (model.config, model.config.get_text_config())
    tied = any(getattr(config, "tie_word_embeddings", False) for config in configs)
    if head is None or embedding is None or not tied:
        return None
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    return names[head], names[embedding]


def drop_weights(module: nn.Module, recurse: bool) -> None:
    """Move parameters to the meta device; buffers are kept, because they may not be on disk."""
    for part in module.modules() if recurse else [module]:
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
