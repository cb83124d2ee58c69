"""Weight files of a checkpoint: shards, their index, and joining finished parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hisvd_cli.modeling.sources.weights import INDEX, SINGLE
from hisvd_cli.utils.files.checksums import intact
from hisvd_cli.utils.files.json_files import write_json
from hisvd_cli.utils.files.tensorfile import join_files, write_tensors

if TYPE_CHECKING:
    from torch import Tensor


SHARD_BYTES = 5 * 10**9
_METADATA = {"format": "pt"}  # transformers refuses safetensors files without it


def shard_names(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Split names, in order, into groups of at most ``limit`` bytes (one item may exceed it)."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def shard_file(index: int, count: int) -> str:
    """Return the file name of shard ``index`` of ``count``."""
    return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, files: Mapping[str, Iterable[str]], total_bytes: int) -> None:
    """Write the index of a sharded checkpoint (file → tensor names); a single file needs none.
    Other weight files, and an index that is not needed, are removed."""
    for path in folder.glob("*.safetensors"):
        if path.name not in files:
            path.unlink()
    if len(files) == 1:
        (folder / INDEX).unlink(missing_ok=True)
        return
    weight_map = {name: file for file, names in files.items() for name in names}
    write_json(
        folder / INDEX,
        {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))},
    )


def parts_left(home: Path, shards: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the parts (of shard → parts) that are to be made: no run has written them yet, or they
    were damaged since.

    Parts are joined once all are there. Where one is missing nevertheless, a file was damaged: then
    weight files that were joined already are removed, as what is made may follow from their parts.
    """

    def left() -> list[str]:
        return [
            part
            for file, parts in shards.items()
            if not intact(home / file)
            for part in parts
            if not intact(home / f"{part}.part")
        ]

    if left():
        for file in shards:
            (home / file).unlink(missing_ok=True)
    return left()


def join_parts(
    home: Path,
    shards: Mapping[str, Sequence[str]],
    names: Mapping[str, Sequence[str]],
    total_bytes: int,
) -> None:
    """Join finished parts (``PART.part``) into weight files, remove the parts, write the index.

    Args:
        home: where they lie.
        shards: file → its parts.
        names: part → names of its tensors.
        total_bytes: of all tensors.
    """
    for file, parts in shards.items():
        pieces = [home / f"{part}.part" for part in parts]
        if not intact(home / file):
            join_files(pieces, home / file, _METADATA)
        for piece in pieces:
            piece.unlink(missing_ok=True)
    held = {
        file: [name for part in parts for name in names[part]] for file, parts in shards.items()
    }
    write_index(home, held, total_bytes)


def write_shards(
    folder: Path,
    sizes: Mapping[str, int],
    make: Callable[[str], Tensor],
    limit: int = SHARD_BYTES,
) -> None:
    """Write tensors into shards of at most ``limit`` bytes; one shard is in memory. Shards that an
    interrupted run left are kept.

    Args:
        folder: where to.
        sizes: name → bytes.
        make: returns a tensor by its name; called in the order of ``sizes``.
        limit: bytes per shard.
    """
    groups = shard_names(sizes, limit)
    files = {shard_file(i, len(groups)): names for i, names in enumerate(groups)}
    for file, names in files.items():
        if not intact(folder / file):
            write_tensors(folder / file, {name: make(name) for name in names}, _METADATA)
    write_index(folder, files, sum(sizes.values()))
