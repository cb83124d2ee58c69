"""Opens models by name: a Hub id, a folder, a ``.gguf`` file or ``demo``."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from hisvd_cli.modeling.sources import adapter_input
from hisvd_cli.modeling.sources.adapter_input import Adapter, check_adapter, open_adapter
from hisvd_cli.modeling.sources.quantized_input import files_say, refusal
from hisvd_cli.modeling.sources.source import DEMO, DEMO_FOLDER, Source, read_config
from hisvd_cli.modeling.sources.weights import LAYOUTS, has_weights, shard_files
from hisvd_cli.modeling.structure.decoders import decoder_blocks
from hisvd_cli.modeling.structure.skeleton import build_meta_model
from hisvd_cli.modeling.structure.sublayers import find_sublayers
from hisvd_cli.utils.errors import SourceError, UnsupportedModelError, reason
from hisvd_cli.utils.files.fingerprints import expanded

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "tokenizer*", "*.py", "*.md", "LICENSE*"]


def open_source(
    name: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    compressible: bool = True,
) -> Source:
    """Open a model: an existing path takes precedence over ``demo``, and ``demo`` over the Hub.

    Args:
        name: folder, ``.gguf`` file, ``demo`` or Hub id.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run the Python code that the model ships.
        compressible: reject Hub models that cannot be compressed before their weights are
            downloaded; False accepts every causal language model, including compressed ones.

    Raises:
        SourceError: the model does not exist, or cannot be downloaded.
        UnsupportedModelError: the model is not supported.
    """
    path = expanded(name)
    if path.is_dir():
        adapter = open_adapter(path)
        if adapter and not has_weights(path):
            return _with_base(name, adapter, trust_remote_code, compressible)
        read_config(path)
        return Source(name, path, trust_remote_code=trust_remote_code)
    if path.is_file():
        return _from_file(name, path)
    if path.exists():
        raise SourceError(
            f"'{name}' is neither a folder nor a regular file.",
            "Give the folder that contains config.json and the weights.",
        )
    if name == DEMO:
        return Source(name, DEMO_FOLDER)
    if not _HUB_ID.fullmatch(name) or path.suffix in {".gguf", ".pt", ".safetensors"}:
        raise SourceError(
            f"No model at '{name}': it is not a folder, a .gguf file or a Hub id.",
            "Check the path, or use a Hub id such as 'HuggingFaceTB/SmolLM2-135M', or 'demo'.",
        )
    return _from_hub(name, revision, trust_remote_code, compressible)


def _from_file(name: str, path: Path) -> Source:
    if path.suffix != ".gguf":
        raise SourceError(
            f"'{name}' is a file, but not a .gguf file.",
            "Give the folder that contains config.json and the weights.",
        )
    from hisvd_cli.modeling.sources.gguf_input import unpack_gguf

    return Source(name, unpack_gguf(path))


def _with_base(name: str, adapter: Adapter, trust_remote_code: bool, compressible: bool) -> Source:
    """Return the base model of an adapter in a separate folder, together with that adapter."""
    check_adapter(adapter)
    _ = adapter.files
    named = adapter.config.get("revision")
    if _same_folder(adapter.base, adapter.folder):
        raise SourceError(
            f"The adapter in {adapter.folder} names itself as its base model.",
            "Set base_model_name_or_path in adapter_config.json to the base model.",
        )
    revision = named if isinstance(named, str) else None
    base = open_source(adapter.base, revision, trust_remote_code, compressible)
    if base.adapter:
        raise UnsupportedModelError(
            f"The base model of {name}, {base.name}, has an adapter too.",
            "Merge that adapter with PEFT first.",
        )
    return replace(base, name=name, adapter_folder=adapter.folder)


def _same_folder(name: str, folder: Path) -> bool:
    path = expanded(name)
    return path.is_dir() and path.resolve() == folder.resolve()


def _from_hub(
    name: str, revision: str | None, trust_remote_code: bool, compressible: bool
) -> Source:
    """Download config and tokenizer first, to reject unsupported models before the weights."""
    folder = _snapshot(name, revision, _SMALL_FILES)
    adapter = open_adapter(folder)
    if adapter:
        check_adapter(adapter)
        _snapshot(name, folder.name, list(adapter_input.FILES))
    if adapter and not (folder / "config.json").is_file():
        return _with_base(name, adapter, trust_remote_code, compressible)
    read_config(folder)
    if method := files_say(folder):
        raise refusal(name, folder, method)
    source = Source(name, folder, folder.name, trust_remote_code)
    _check_structure(source, compressible)
    for files in _weight_files(folder):
        # By commit, so that weights and config match even if the branch moves meanwhile.
        _snapshot(name, source.revision, files)
        if (folder / files[0]).is_file():
            return source
    if adapter:
        return _with_base(name, adapter, trust_remote_code, compressible)
    raise SourceError(
        f"'{name}' has neither {LAYOUTS[0][1]} nor {LAYOUTS[1][1]}, single or sharded.",
        "Use another model; when offline, one that was completely downloaded before.",
    )


def _check_structure(source: Source, compressible: bool) -> None:
    model = build_meta_model(source, compressed=not compressible)
    if compressible:
        prefix, layers = decoder_blocks(model)
        find_sublayers(prefix, list(layers))


def _weight_files(folder: Path) -> list[list[str]]:
    """Return the alternatives for the weight files, in order of preference.

    Exact names, because a repository may contain the same weights in several formats and folders.
    """
    return [
        files
        for index, single in LAYOUTS
        for files in (
            [single],
            *([shard_files(folder / index)] if (folder / index).is_file() else []),
        )
    ]


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise SourceError(
            f"'{name}' is gated on the Hub.",
            "Accept its terms on its Hub page, then set HF_TOKEN or run 'hf auth login'.",
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"'{name}' is neither a local path nor a model on the Hub.",
            "Check the spelling; for a private model, set HF_TOKEN.",
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        offline = isinstance(error, LocalEntryNotFoundError | ConnectionError)
        why = " (offline?)." if offline else f": {reason(error)}"
        raise SourceError(
            f"'{name}' is neither a local path nor reachable on the Hub{why}",
            "Check the name and the network, or give the path of a downloaded model.",
        ) from error
