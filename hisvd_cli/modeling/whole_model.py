"""Loads a whole model into memory, through transformers if it can read the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hisvd_cli.modeling.checkpoints.checkpoint import is_checkpoint
from hisvd_cli.modeling.sources.source import Source, read_config
from hisvd_cli.modeling.sources.weights import open_weights
from hisvd_cli.modeling.structure.naming import find_naming
from hisvd_cli.modeling.structure.skeleton import auto_class, build_stored_model
from hisvd_cli.modeling.structure.tensors import own_head, read_tensor, tensor_names
from hisvd_cli.utils.errors import SourceError
from hisvd_cli.utils.library_errors import library_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_source(source: Source, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model, dense or compressed.

    The weights are the same as those of the block walk: dequantized, with adapters merged, without
    wrapper prefixes, and with the output head that is on disk.

    Raises:
        SourceError: tensors are missing or damaged, or have the wrong shape.
        UnsupportedModelError: the model cannot be built or read.
    """
    if is_checkpoint(source.folder):  # the installed loader is used, not the checkpoint's copy
        source = replace(source, trust_remote_code=False)
    model = build_stored_model(source, dtype, working=False)
    try:
        names = tensor_names(model, source)
    except SourceError:
        if source.weights.recipes:
            raise
        names = {}  # transformers may know these names
    ours = source.weights.recipes or _has_empty_quantization(source)
    if not names or not (ours or _is_other(model, source, names)):
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


def _has_empty_quantization(source: Source) -> bool:
    """Return whether config.json has quantization settings that are empty, at which transformers
    fails."""
    return "quantization_config" in read_config(source.folder) and not source.quantization


def _is_other(model: PreTrainedModel, source: Source, names: Mapping[str, str]) -> bool:
    """Return whether transformers would read other tensors than these, or none."""
    prefix, by_rules = f"{model.base_model_prefix}.", find_naming(model, source).by_rules
    if any(
        stored not in (name, name.removeprefix(prefix))
        for name, stored in names.items()
        if name not in by_rules
    ):
        return True
    return own_head(model, names)


def _tie(model: PreTrainedModel) -> None:
    """Tie the head to the embedding if it has no tensor on disk; otherwise record it as untied."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None:
        return
    if head.weight.device.type == "meta":
        head.weight = embedding.weight
    elif head.weight is not embedding.weight:
        for part in (model.config, model.config.get_text_config()):
            part.tie_word_embeddings = False


def _configure(model: PreTrainedModel, source: Source) -> None:
    """Load the generation settings of the folder, as ``from_pretrained`` does."""
    from transformers import GenerationConfig

    if model.can_generate() and (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)


def load_model(
    folder: Path, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a dense or compressed folder with transformers, strictly.

    For a compressed folder, the installed loader is used instead of the copy in the folder.

    Raises:
        SourceError: tensors are missing or have the wrong shape.
    """
    import hisvd_cli.modeling.layers.transformers_plugin  # noqa: F401  (registers the loader)

    open_weights(folder)
    hint = f"Run: hisvd inspect {folder}"
    with library_errors(lambda why: SourceError(f"transformers cannot load {folder}: {why}", hint)):
        source = Source(str(folder), folder, trust_remote_code=trust_remote_code)
        loaded: Any = auto_class(source.config).from_pretrained(
            folder, dtype=dtype, output_loading_info=True, trust_remote_code=source.runs_code
        )
    _check_loading(folder, loaded[1])
    model: PreTrainedModel = loaded[0].to(device)
    model.eval()
    return model


def _check_loading(folder: Path, report: Mapping[str, Sequence[Any]]) -> None:
    for kind, fault in (("missing_keys", "missing"), ("mismatched_keys", "of the wrong shape")):
        if keys := sorted(str(key) for key in report.get(kind, ())):
            raise SourceError(
                f"{folder} has {len(keys)} tensors that are {fault}: {', '.join(keys[:3])}.",
                f"Run: hisvd inspect {folder}",
            )
