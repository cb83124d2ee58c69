"""A model in memory as a whole: by transformers where it can read what is on disk, else filled here
from the same tensors that the walk over blocks reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hisvd_cli.modeling.checkpoints.checkpoint import is_checkpoint
from hisvd_cli.modeling.skeleton import build_stored_model, own_head, read_tensor, tensor_names
from hisvd_cli.modeling.sources.source import names_own_loader, read_config
from hisvd_cli.modeling.sources.weights import open_weights
from hisvd_cli.utils.errors import SourceError
from hisvd_cli.utils.library_errors import library_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hisvd_cli.modeling.sources.source import Source


def load_source(source: Source, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model, dense or compressed.

    Its weights are the same as those of the walk over blocks: dequantized, with an adapter merged
    in, without the prefixes of wrappers, and with the output head that lies on disk.

    Raises:
        SourceError: tensors are missing, damaged or misshapen.
        UnsupportedModelError: it cannot be built, or not be read.
    """
    if is_checkpoint(source.folder):  # its own copy of the loader is not needed here
        source = replace(source, trust_remote_code=False)
    model = build_stored_model(source, dtype)
    try:
        names = tensor_names(model, source)
    except SourceError:
        if source.weights.recipes:
            raise
        names = {}  # transformers may know these names
    if not names or not (source.weights.recipes or _is_other(model, names)):
        return load_model(source.folder, device, dtype, source.trust_remote_code)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, stored in names.items():
        parent, _, local = name.rpartition(".")
        tensor = read_tensor(source, stored, name, shapes[name], dtype).to(device)
        model.get_submodule(parent).load_state_dict({local: tensor}, strict=False, assign=True)
    _tie(model)
    _configure(model, source)
    nn.Module.to(model, device)  # buffers too
    model.eval()
    return model


def _is_other(model: PreTrainedModel, names: Mapping[str, str]) -> bool:
    """Tell whether transformers would read other tensors than those named, or none."""
    prefix = f"{model.base_model_prefix}."
    if any(stored not in (name, name.removeprefix(prefix)) for name, stored in names.items()):
        return True
    return own_head(model, names)


def _tie(model: PreTrainedModel) -> None:
    """Share the embedding with a head that has no tensor; a head of its own stays so."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None:
        return
    if head.weight.device.type == "meta":
        head.weight = embedding.weight
    elif head.weight is not embedding.weight:
        for part in (model.config, model.config.get_text_config()):
            part.tie_word_embeddings = False


def _configure(model: PreTrainedModel, source: Source) -> None:
    """Give a model the generation settings of its folder, as ``from_pretrained`` does."""
    from transformers import GenerationConfig

    if model.can_generate() and (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)


def load_model(
    folder: Path, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a dense or compressed folder with transformers, strictly.

    The loader that a compressed folder carries is not run: the installed one does the same.

    Raises:
        SourceError: tensors are missing, superfluous or misshapen.
    """
    from transformers import AutoModelForCausalLM

    import hisvd_cli.modeling.layers.transformers_plugin  # noqa: F401  (registers the loader)

    open_weights(folder)
    hint = f"Look closer with: hisvd inspect {folder}"
    with library_errors(lambda why: SourceError(f"transformers cannot load {folder}: {why}", hint)):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=trust_remote_code and not names_own_loader(read_config(folder)),
        )
    _check_loading(folder, loaded[1])
    model: PreTrainedModel = loaded[0].to(device)
    model.eval()
    return model


def _check_loading(folder: Path, report: Mapping[str, Sequence[Any]]) -> None:
    for kind, word in (("missing_keys", "lacks"), ("mismatched_keys", "holds misshapen")):
        if keys := sorted(str(key) for key in report.get(kind, ())):
            raise SourceError(
                f"{folder} {word} {len(keys)} tensors: {', '.join(keys[:3])}.",
                f"Look closer with: hisvd inspect {folder}",
            )
