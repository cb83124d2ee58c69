"""``.gguf`` files as input: dequantized once by transformers into a cached folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from hisvd_cli.errors import SourceError
from hisvd_cli.paths import cache_root, file_digest, slug

if TYPE_CHECKING:
    import torch


def unpack_gguf(path: Path) -> Path:
    """Return a Hugging Face folder with the dequantized weights of a ``.gguf`` file.

    The folder lies in the cache under the file's hash, so each file is unpacked once. Weights are
    stored in bfloat16, whose rounding is far below that of any quantized type; a file in float32
    stays in float32.

    Raises:
        SourceError: the extra ``gguf`` is not installed, or the file cannot be read.
    """
    folder = cache_root() / "gguf" / f"{slug(path.name)}-{file_digest(path)[:16]}"
    if folder.is_dir():
        return folder
    try:
        dtype = _stored_dtype(path)
    except ImportError as error:
        raise SourceError(
            f"Reading {path.name} needs the package 'gguf'.", "Run: pip install 'hisvd[gguf]'"
        ) from error
    except (ValueError, OSError, KeyError) as error:
        raise SourceError(f"{path} is no complete GGUF file: {error}", "Fetch it again.") from error
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _dequantize(path, temporary, dtype)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _stored_dtype(path: Path) -> torch.dtype:
    import torch
    from gguf import GGMLQuantizationType, GGUFReader

    matrices = [t.tensor_type for t in GGUFReader(path).tensors if len(t.shape) > 1]
    full = all(kind == GGMLQuantizationType.F32 for kind in matrices)
    return torch.float32 if full else torch.bfloat16


def _dequantize(path: Path, folder: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise SourceError(
            f"transformers cannot read {path}: {str(error).strip().splitlines()[0]}",
            "Use the model's safetensors version.",
        ) from error
    # The dequantized model still says that it is quantized, and save_pretrained would refuse it.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.__dict__.update(hf_quantizer=None, is_quantized=False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
