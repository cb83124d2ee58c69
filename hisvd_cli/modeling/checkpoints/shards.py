"""Writes the weight files of a checkpoint: shards and their index."""

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
_METADATA = {"format": "pt"}  # transformers rejects safetensors files without it


def shard_names(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Split names, in order, into groups of at most ``limit`` bytes; a single tensor may exceed
    it."""
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
    """Write the index of a sharded checkpoint; a single file needs none.

    Other weight files and an unneeded index are removed.

    Args:
        folder: the checkpoint folder.
        files: file → tensor names.
        total_bytes: size of all tensors.
    """
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
    """Return the parts that are missing or damaged.

    Parts are joined only when all are complete. If a part is missing although shards were joined,
    a file was damaged; the joined shards are then removed, because later parts may depend on the
    parts that they were joined from.

    Args:
        home: folder of the parts and shards.
        shards: shard file → names of its parts.
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
    """Join finished parts (``PART.part``) into shards, remove the parts and write the index.

    Args:
        home: folder of the parts and shards.
        shards: shard file → names of its parts.
        names: part → names of its tensors.
        total_bytes: size of all tensors.
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
    """Write tensors into shards of at most ``limit`` bytes, with one shard in memory at a time.
    Intact shards of an interrupted run are kept.

    Args:
        folder: output folder.
        sizes: tensor name → bytes.
        make: returns the tensor of a name; called in the order of ``sizes``.
        limit: bytes per shard.
    """
    groups = shard_names(sizes, limit)
    files = {shard_file(i, len(groups)): names for i, names in enumerate(groups)}
    for file, names in files.items():
        if not intact(folder / file):
            write_tensors(folder / file, {name: make(name) for name in names}, _METADATA)
    write_index(folder, files, sum(sizes.values()))
