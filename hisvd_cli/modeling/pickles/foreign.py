"""Reads `.pt` files of other tools without executing them.

SVD-LLM, HiSVD and ZS-SVD pickle whole models, whose classes only exist in their repositories.
`read_foreign` reads names, shapes, dtypes and sizes through `unpickle.Machine`, which builds inert
records; `low_rank_pairs.find_pairs` recognizes low-rank factors by name and shape.

`problems` lists globals that are known to execute code when other tools load the file. Such a list
cannot be complete: a file without problems may still be unsafe for `torch.load`.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hisvd_cli.modeling.pickles.bounded_reader import BoundedReader, check_inflated
from hisvd_cli.modeling.pickles.code_check import code_problems, runners
from hisvd_cli.modeling.pickles.records import Node, RefusedError, Tensor, clean
from hisvd_cli.modeling.pickles.tensor_names import TensorWalk
from hisvd_cli.modeling.pickles.unpickle import Machine
from hisvd_cli.utils.errors import SourceError

_ZIP_START = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_DAMAGE = (
    *(ValueError, OverflowError, EOFError, OSError, NotImplementedError),
    *(struct.error, zlib.error, zipfile.BadZipFile),
)


@dataclass(frozen=True)
class ForeignTensor:
    """A named tensor of the file; tensors with the same `storage` share their data."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    storage: str = ""
    storage_bytes: int = 0


@dataclass(frozen=True)
class ForeignCheckpoint:
    """The content of a foreign file.

    Attributes:
        path: the file.
        tensors: name → tensor.
        classes: module path → class name, as recorded in the file.
        globals_seen: all globals that the file names.
        file_bytes: size of the file.
        problems: problems to consider before loading the file with other tools.
    """

    path: Path
    tensors: dict[str, ForeignTensor]
    classes: dict[str, str]
    globals_seen: tuple[str, ...]
    file_bytes: int
    problems: tuple[str, ...]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of tensor data in the file; shared data is counted once."""
        return sum({t.storage: t.storage_bytes for t in self.tensors.values()}.values())


def read_foreign(path: Path) -> ForeignCheckpoint:
    """Read names, shapes, dtypes and sizes of a `torch.save` file without executing it.

    Raises:
        SourceError: the file is missing, damaged, not a torch checkpoint, or rejected.
    """
    machine = Machine(0)
    try:
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            machine = Machine(file_bytes)
            read = _read_zip if file.read(4) == _ZIP_START else _read_legacy
            file.seek(0)
            root, problems = read(file, file_bytes, machine)
        walk = TensorWalk(root, machine.operations)
    except _DAMAGE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        message = f"{path} is not a readable torch checkpoint: {clean(reason)}"
        raise SourceError(message, _hint(machine)) from error
    tensors = {name: _foreign(name, tensor) for name, tensor in walk.tensors.items()}
    problems = [*code_problems(machine), *problems, *_data_problems(walk, machine)]
    seen = tuple(sorted({named.path for named in machine.globals.values()}))
    return ForeignCheckpoint(path, tensors, walk.classes, seen, file_bytes, tuple(problems))


def _hint(machine: Machine) -> str:
    named = runners(machine)
    if named:
        several = ", ".join(f"`{path}`" for path in named[:3])
        return f"It uses {several}: do not load it with other tools. It was not executed here."
    return "Download or save it again. Supported: files of torch.save, in zip or legacy format."


def _foreign(name: str, tensor: Tensor) -> ForeignTensor:
    nbytes = math.prod(tensor.shape) * tensor.item_size
    storage = tensor.storage
    return ForeignTensor(name, tensor.shape, tensor.dtype, nbytes, storage.key, storage.nbytes)


def _read_zip(file: BinaryIO, size: int, machine: Machine) -> tuple[object, list[str]]:
    with zipfile.ZipFile(file) as archive:
        entry = _pickle_entry(archive)
        check_inflated(entry.file_size, size)
        with archive.open(entry) as stream:
            root = machine.load(BoundedReader(stream, entry.file_size))
            stream.read(1)  # reading past the end verifies the CRC
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    folder = entry.filename.removesuffix("data.pkl")
    wrong = [
        storage.key
        for storage in machine.storages.values()
        if sizes.get(f"{folder}data/{storage.key}", 0) != storage.nbytes
    ]
    problems = []
    if wrong:
        problems.append(
            f"{len(wrong)} storages are missing or of the wrong size, such as `{wrong[0]}`"
        )
    if any(name.startswith(f"{folder}code/") for name in sizes):
        problems.append("a TorchScript archive, with code that other tools compile")
    return root, problems


def _pickle_entry(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    entries = [i for i in archive.infolist() if re.fullmatch(r"[^/]+/data\.pkl", i.filename)]
    if len(entries) != 1:
        raise RefusedError(f"the zip file has {len(entries)} data.pkl instead of one")
    entry = entries[0]
    if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise RefusedError("its data.pkl is encrypted or compressed in an unusual way")
    return entry


def _read_legacy(file: BinaryIO, size: int, machine: Machine) -> tuple[object, list[str]]:
    reader = BoundedReader(file, size)
    if machine.load(reader) != _LEGACY_MAGIC:
        raise RefusedError("it is a plain pickle without torch's magic number")
    machine.load(reader)  # protocol version
    machine.load(reader)  # sizes of the writer's C types
    root = machine.load(reader)
    keys = machine.load(reader)
    listed = (keys.items or []) if isinstance(keys, Node) else []
    stored = {key for key in listed if isinstance(key, str)}
    needed = sum(8 + s.nbytes for s in machine.storages.values() if s.key in stored)
    missing = [key for key in machine.storages if key not in stored]
    if size - reader.tell() < needed:
        raise RefusedError(f"it is {needed - size + reader.tell():,} bytes too short")
    problems = [f"{len(missing)} storages are missing, such as `{missing[0]}`"] if missing else []
    return root, problems


def _data_problems(walk: TensorWalk, machine: Machine) -> list[str]:
    problems = []
    beyond = [name for name, tensor in walk.tensors.items() if _end(tensor) > tensor.storage.nbytes]
    if beyond:
        problems.append(f"{len(beyond)} tensors exceed their storage, such as `{beyond[0]}`")
    listed = {tensor.storage.key for tensor in walk.tensors.values()}
    unlisted = [s.nbytes for key, s in machine.storages.items() if key not in listed]
    if unlisted:
        total = f"{sum(unlisted):,} bytes"
        problems.append(f"{len(unlisted)} storages ({total}) are not used by any known tensor")
    return problems + walk.problems


def _end(tensor: Tensor) -> int:
    if 0 in tensor.shape:
        return 0
    strides = zip(tensor.shape, tensor.stride, strict=True)
    last = tensor.offset + sum((size - 1) * step for size, step in strides)
    return (last + 1) * tensor.item_size
