"""The small files that travel with weights: tokenizer, generation config, processors, licence.

They are known by their names, so that nothing else of a folder or of a ``.pt`` file gets into a
checkpoint, and from there to the hub: no dot-file, no code, no profile.
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
    """Tell whether a file of this name travels with weights."""
    return _KNOWN.fullmatch(name) is not None


def is_own_file(path: Path) -> bool:
    """Tell whether a path is a file of the folder that it lies in.

    A link counts if it ends inside that folder or in the hub's cache, whose folders consist of
    links: elsewhere, it would copy whatever file of this machine it names.
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
        homes.append(repository)  # of a hub cache that lies elsewhere
    return homes


def companions(folder: Path) -> list[Path]:
    """Return the files of a folder that travel with its weights."""
    return [path for path in _named(folder) if is_own_file(path)]


def licences(folder: Path) -> list[str]:
    """Return the names of a folder's licence files."""
    return [path.name for path in companions(folder) if _LICENCES.fullmatch(path.name)]


def copy_companions(source: Path, target: Path) -> None:
    """Copy the small files that travel with the weights."""
    for path in companions(source):
        shutil.copyfile(path, target / path.name)


def copy_code(source: Path, target: Path, modules: Iterable[str]) -> None:
    """Copy the Python files of ``modules``, and those beside them that they import."""
    from transformers.dynamic_module_utils import get_relative_import_files

    for path in (source / f"{module}.py" for module in sorted(modules)):
        if is_own_file(path):
            for file in {path, *map(Path, get_relative_import_files(path))}:
                if is_own_file(file) and file.parent == source:
                    shutil.copyfile(file, target / file.name)


def warn_of_links(folder: Path, reporter: Reporter) -> None:
    """Name the files that would travel, if they were no links to somewhere else."""
    for path in _named(folder):
        if path.is_file() and not is_own_file(path):
            reporter.warn(
                f"{path} links to a file outside its folder, so it is not copied. Put the file "
                "itself there if it belongs to the model."
            )


def _named(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if is_companion(path.name)]


def card_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of a folder's card, empty where it has none or it cannot be read."""
    import yaml
    from huggingface_hub import metadata_load

    path = folder / CARD
    try:
        return dict(metadata_load(path) or {}) if is_own_file(path) else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
