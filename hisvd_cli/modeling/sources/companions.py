"""The small files copied along with weights: tokenizer, generation config, processors, licence.

They are selected by name, so that nothing else of a folder or a ``.pt`` file, such as dotfiles,
code or profiles, gets into a checkpoint and from there to the Hub.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hisvd_cli.utils.progress import Reporter

CARD = "README.md"
"""A model card."""
_TOKENIZER = r"""
    added_tokens\.json | bpe\.codes | chat_template\.(jinja|json) | encoder\.json | merges\.txt
    | normalizer\.json | sentencepiece(\.bpe)?\.model | special_tokens_map\.json | spiece\.model
    | spm\.model | tekken\.json | tokenizer(_config)?\.json | tokenizer\.model(\.v\d+\w*)?
    | tiktoken\.model | \w+\.tiktoken | vocab\.(bpe|json|txt)
"""
_CONFIG = r"generation_config\.json | (\w+_)?(pre)?processor_config\.json"
_LICENCE = r"""
    (?i: LICEN[CS]E | COPYING | NOTICE | USE_POLICY )([-_]\w+)*(\.(?i: md | pdf | rst | txt ))?
"""
_KNOWN = re.compile(f"{_TOKENIZER} | {_CONFIG} | {_LICENCE}", re.VERBOSE | re.ASCII)
_LICENCES = re.compile(_LICENCE, re.VERBOSE | re.ASCII)


def is_companion(name: str) -> bool:
    """Return whether a file of this name is copied along with weights."""
    return _KNOWN.fullmatch(name) is not None


def is_own_file(path: Path) -> bool:
    """Return whether a path is a file that belongs to its folder.

    Links must point into that folder or into the Hub cache, whose folders consist of links.
    Following other links could copy any file of this machine.
    """
    if not path.is_file():
        return False
    end = path.resolve()
    return any(end.is_relative_to(home) for home in _homes(path.parent.resolve()))


def _homes(folder: Path) -> list[Path]:
    from huggingface_hub.constants import HF_HUB_CACHE

    homes = [folder, Path(HF_HUB_CACHE).resolve()]
    repository = folder.parent.parent
    if folder.parent.name == "snapshots" and repository.name.startswith("models--"):
        homes.append(repository)  # in a Hub cache at another location
    return homes


def companions(folder: Path) -> list[Path]:
    """Return the files of a folder that are copied along with its weights."""
    return [path for path in _named(folder) if is_own_file(path)]


def licences(folder: Path) -> list[str]:
    """Return the names of a folder's licence files."""
    return [path.name for path in companions(folder) if _LICENCES.fullmatch(path.name)]


def copy_companions(source: Path, target: Path) -> None:
    """Copy the small files that belong to the weights."""
    for path in companions(source):
        shutil.copyfile(path, target / path.name)


def copy_code(source: Path, target: Path, modules: Iterable[str]) -> None:
    """Copy the Python files of ``modules`` and the files in the same folder that they import."""
    from transformers.dynamic_module_utils import get_relative_import_files

    for path in (source / f"{module}.py" for module in sorted(modules)):
        if is_own_file(path):
            for file in {path, *map(Path, get_relative_import_files(path))}:
                if is_own_file(file) and file.parent == source:
                    shutil.copyfile(file, target / file.name)


def warn_of_links(folder: Path, reporter: Reporter) -> None:
    """Warn about files that are not copied because they are links to other folders."""
    for path in _named(folder):
        if path.is_file() and not is_own_file(path):
            reporter.warn(
                f"{path} links to a file outside its folder and is not copied. Replace the link "
                "with the file if it belongs to the model."
            )


def _named(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if is_companion(path.name)]


def card_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of a folder's card; empty if there is none or it cannot be read."""
    import yaml
    from huggingface_hub import metadata_load

    path = folder / CARD
    try:
        return dict(metadata_load(path) or {}) if is_own_file(path) else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
