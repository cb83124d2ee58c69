"""Recognizes quantized models, and rejects formats that cannot be dequantized.

The config is checked before weights are downloaded or opened. Tensor names are checked when the
weights are opened, because the config may not mention the quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hisvd_cli.modeling.sources.companions import card_metadata
from hisvd_cli.utils.errors import SourceError, UnsupportedModelError
from hisvd_cli.utils.files.json_files import read_json

OWN = "hisvd"
FILES = (
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "quantization_config.json",
    "quanto_qmap.json",
    "qmodel.pt",
)
"""Files beside config.json that may describe the quantization."""

CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys of config.json that may describe the quantization."""

_TITLES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "quanto": "quanto",
    "torchao": "torchao",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "spqr": "SpQR",
    "higgs": "HIGGS",
    "bitnet": "BitNet",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "quark": "Quark",
    "fp_quant": "FP-Quant",
    "auto-round": "AutoRound",
    "mlx": "MLX",
    "nvfp4": "NVFP4",
    "modelopt": "ModelOpt",
    "compressed-tensors": "compressed-tensors",
}
_READABLE = ("fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4", "modelopt")
_READABLE_LAYOUTS = (
    *("dense", "float-quantized", "int-quantized", "naive-quantized", "pack-quantized"),
)
"""Layouts of compressed-tensors."""

_MARKS = (
    # (suffix of a tensor name, method); the first match determines the method
    (".qzeros", "gptq"),
    (".g_idx", "gptq"),
    (".SCB", "bitsandbytes"),
    (".absmax", "bitsandbytes"),
    (".quant_map", "bitsandbytes"),
    (".W_q", "hqq"),
    ("._data", "quanto"),
    ("_qdata", "torchao"),
    (".weight_scales", "eetq"),
    (".codebooks", "aqlm"),
    (".q_weight", "exl2"),
    (".trellis", "exl3"),
    (".qweight", "gptq"),
    (".weight_scale_2", "nvfp4"),
    (".weight_global_scale", "nvfp4"),
)


def config_says(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the quantization method and its settings in config.json; empty for none.

    Raises:
        SourceError: the quantization settings are not a JSON object.
    """
    text = config.get("text_config")
    for document in (config, text if isinstance(text, dict) else {}):
        for key in CONFIG_KEYS:
            said = document.get(key)
            if said in (None, {}, False):
                continue
            if not isinstance(said, dict):
                raise SourceError(
                    f"{key} in config.json is of type {type(said).__name__}, not an object.",
                    "Download the model again, or remove the key if the weights are not quantized.",
                )
            return _method(said, key), dict(said)
    return "", {}


def _method(said: Mapping[str, Any], key: str) -> str:
    named = said.get("quant_method")
    if isinstance(named, str) and named:
        return named.lower()
    if said.get("load_in_4bit") or said.get("load_in_8bit"):
        return "bitsandbytes"
    if key == "quantization":
        return "mlx"
    return "compressed-tensors" if "config_groups" in said else "an unnamed method"


def check_config(name: str, folder: Path, config: Mapping[str, Any]) -> None:
    """Reject models that are quantized in an unsupported format according to config.json.

    Raises:
        UnsupportedModelError: the format is not supported.
        SourceError: the quantization settings are not a JSON object.
    """
    method, said = config_says(config)
    if not method or method == OWN:
        return
    if method not in _READABLE:
        raise refusal(name, folder, method)
    if method == "compressed-tensors":
        _check_layout(name, folder, said)


def _check_layout(name: str, folder: Path, said: Mapping[str, Any]) -> None:
    """Reject layouts of compressed-tensors that are more than scaled values."""
    groups = said.get("config_groups")
    named = [said.get("format")]
    if isinstance(groups, dict):
        named += [group.get("format") for group in groups.values() if isinstance(group, dict)]
    odd = [str(one) for one in named if one and one not in (*_READABLE_LAYOUTS, "mixed-precision")]
    sparse = said.get("sparsity_config")
    if isinstance(sparse, dict) and sparse.get("format") not in (None, "dense"):
        odd.append(str(sparse["format"]))
    if said.get("transform_config"):
        odd.append("rotated weights")
    if odd:
        raise refusal(name, folder, method="compressed-tensors", detail=odd[0])


def check_names(name: str, folder: Path, infos: Mapping[str, Any]) -> None:
    """Reject models that are quantized in an unsupported format according to their tensors.

    Args:
        name: the model as named by the user.
        folder: its folder.
        infos: name → header entry of each tensor on disk.

    Raises:
        UnsupportedModelError: the format is not supported.
    """
    for ending, method in _MARKS:
        if found := next((each for each in infos if each.endswith(ending)), None):
            if method == "gptq" and _is_awq(folder):
                method = "awq"
            if ending == ".g_idx" and f"{found.removesuffix(ending)}.weight_packed" in infos:
                continue
            raise refusal(name, folder, method, detail=f"tensor {found}")
    said = files_say(folder)
    for each, info in infos.items():
        integers = "float" not in info.dtype and len(info.shape) > 1
        if integers and (said or (each.endswith(".weight") and info.dtype != "int8")):
            shown = f"tensor {each} of {info.dtype}"
            raise refusal(name, folder, said or "an unnamed method", shown)


def _is_awq(folder: Path) -> bool:
    """Return whether the config files name AWQ, whose tensor names equal those of GPTQ."""
    for file in ("config.json", *FILES):
        try:
            text = (folder / file).read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
        if '"awq"' in text.lower() or '"gemm"' in text.lower():
            return True
    return False


def files_say(folder: Path) -> str:
    """Return the unsupported method that a file beside config.json names; empty for none."""
    for file in FILES:
        path = folder / file
        if not path.is_file():
            continue
        if file == "quanto_qmap.json":
            return "quanto"
        if file == "qmodel.pt":
            return "hqq"
        method = _named_in(path)
        if method not in _READABLE:
            return method
    return ""


def _named_in(path: Path) -> str:
    try:
        said = read_json(path, strict=False)
    except (OSError, ValueError):
        return "an unnamed method"
    if not isinstance(said, dict):
        return "an unnamed method"
    if isinstance(inner := said.get("quantization"), dict):  # ModelOpt
        algorithm = str(inner.get("quant_algo") or "")
        return "modelopt" if algorithm.upper().startswith("FP8") else algorithm.lower()
    if "w_bit" in said or "zero_point" in said:
        return "awq"
    method = _method(said, "")
    return "gptq" if method == "an unnamed method" and "bits" in said else method


def refusal(name: str, folder: Path, method: str, detail: str = "") -> UnsupportedModelError:
    """Return the error for an unsupported format; names the original model if the card does."""
    title = _TITLES.get(method, method)
    shown = f"{title}, {detail}" if detail else title
    original = original_of(folder)
    where = f", '{original}' according to its card" if original else ""
    return UnsupportedModelError(
        f"{name} is quantized ({shown}), a format that hisvd cannot dequantize.",
        f"Use the full-precision model that it was made from{where}.",
    )


def original_of(folder: Path) -> str:
    """Return the base model named in the model card; empty for none."""
    named = card_metadata(folder).get("base_model")
    first = named[0] if isinstance(named, list) and named else named
    return first if isinstance(first, str) else ""
