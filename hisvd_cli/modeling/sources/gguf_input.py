"""Reads ``.gguf`` files, dequantized once by transformers into a cached folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hisvd_cli.modeling.sources.gguf_header import check_gguf
from hisvd_cli.utils.errors import SourceError
from hisvd_cli.utils.files.artifact import building
from hisvd_cli.utils.files.fingerprints import cache_root, file_digest, slug
from hisvd_cli.utils.library_errors import library_errors

if TYPE_CHECKING:
    import torch


def unpack_gguf(path: Path) -> Path:
    """Return a Hugging Face folder with the dequantized weights of a ``.gguf`` file.

    The folder is cached under the hash of the file, so that each file is unpacked once. Matrices in
    float32, float16 or bfloat16 keep their precision; quantized ones are stored in bfloat16.

    Raises:
        SourceError: the extra ``gguf`` is not installed, or the file cannot be read.
        OutputError: the cache cannot be written.
    """
    content = file_digest(path)
    folder = cache_root() / "gguf" / f"{slug(path.name)}-{content[:16]}"
    if folder.is_dir():
        return folder
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise SourceError(
            f"Reading {path.name} needs the package 'gguf'.", "Run: pip install 'hisvd[gguf]'"
        ) from error
    with library_errors(lambda why: _incomplete(path, why)):
        dtype = _stored_dtype(path)
    with building(folder, content) as partial:
        _dequantize(path, partial, dtype)
    return folder


def _incomplete(path: Path, why: str) -> SourceError:
    return SourceError(f"{path} is not a complete GGUF file: {why}", "Download it again.")


def _stored_dtype(path: Path) -> torch.dtype:
    import torch
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

    check_gguf(path, {int(kind): size for kind, size in GGML_QUANT_SIZES.items()})
    kinds = {t.tensor_type for t in GGUFReader(path).tensors if len(t.shape) > 1}
    if kinds == {GGMLQuantizationType.F32}:
        return torch.float32
    return torch.float16 if kinds == {GGMLQuantizationType.F16} else torch.bfloat16


def _dequantize(path: Path, folder: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {
        "pretrained_model_name_or_path": path.parent,
        "gguf_file": path.name,
        "trust_remote_code": False,  # otherwise transformers prompts if the folder contains code
    }
    with library_errors(lambda why: _unreadable(path, why)):
        model = AutoModelForCausalLM.from_pretrained(**where, **_unpacking(), dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    # The dequantized model is still marked as quantized, which save_pretrained would reject.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.__dict__.update(hf_quantizer=None, is_quantized=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _unreadable(path: Path, why: str) -> SourceError:
    return SourceError(
        f"transformers cannot read {path}: {why}", "Use the model's safetensors version."
    )


def _unpacking() -> dict[str, Any]:
    """Return the arguments that make transformers dequantize. Newer versions otherwise keep weights
    packed if the package ``kernels`` is installed; older versions always dequantize."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}
