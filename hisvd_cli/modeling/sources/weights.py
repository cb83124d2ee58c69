"""The tensors of a model folder, read one at a time by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hisvd_cli.utils.errors import NumericalError, SourceError, reason
from hisvd_cli.utils.files.json_files import read_json
from hisvd_cli.utils.files.safetensors_header import TensorInfo, dtype_name
from hisvd_cli.utils.files.tensorfile import read_header

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LAYOUTS = ((INDEX, SINGLE), ("pytorch_model.bin.index.json", "pytorch_model.bin"))
"""(shard index, single file) in order of preference. If both exist, the single file is read, as in
transformers."""
_CHECKED = 1 << 22
"""Values checked at a time."""


@dataclass(frozen=True)
class Derived:
    """A tensor of a model that is computed from tensors on disk.

    Attributes:
        info: its dtype and shape.
        make: computes it. Raises SourceError, NumericalError.
        stored: names of the tensors on disk that it is computed from.
    """

    info: TensorInfo
    make: Callable[[], Tensor]
    stored: tuple[str, ...]


@dataclass(frozen=True)
class Weights:
    """The tensors of one folder.

    Attributes:
        infos: name → dtype, shape and byte range, for every tensor on disk.
        where: name → file.
        recipes: name → function that computes a tensor that is not stored as it is read, such as a
            dequantized one.
        parts: additional files that recipes read.
        derived: name → tensor of a model that is not stored as such; added when the model is known.
        unchecked: names of buffers, which may be infinite; likewise.
    """

    infos: dict[str, TensorInfo]
    where: dict[str, Path]
    _legacy: dict[Path, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    recipes: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict, repr=False)
    parts: tuple[Path, ...] = ()
    derived: dict[str, Derived] = field(default_factory=dict, repr=False)
    unchecked: set[str] = field(default_factory=set, repr=False)
    _last: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def files(self) -> list[Path]:
        """The weight files, each once, sorted by name."""
        return sorted({*self.where.values(), *self.parts})

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.infos.values())

    @property
    def dtype(self) -> str:
        """The floating-point dtype with the most bytes; any dtype if no tensor is floating-point.
        Raises SourceError if torch does not support it."""
        sizes: dict[str, int] = {}
        for info in self.infos.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        floats = {dtype: size for dtype, size in sizes.items() if "float" in dtype} or sizes
        import torch

        dtype = max(floats, key=lambda dtype: floats[dtype])
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise SourceError(
                f"The weights in {self.files[0].parent} have the dtype {dtype}, which torch does "
                "not support.",
                "Use a version of the model in float32, float16 or bfloat16.",
            )
        return dtype

    def __contains__(self, name: object) -> bool:
        return name in self.where

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def info(self, name: str) -> TensorInfo:
        """Return dtype and shape of a tensor on disk or of a derived one."""
        return self.infos[name] if name in self.infos else self.derived[name].info

    def read(self, name: str) -> Tensor:
        """Read one tensor on disk, or compute a derived one, to the CPU.

        Raises:
            SourceError: the file is damaged.
            NumericalError: the tensor contains NaN or infinite values.
        """
        if name not in self.where and name in self.derived:
            return self.derived[name].make()
        path = self.where[name]
        if recipe := self.recipes.get(name):
            tensor = recipe()
        else:
            mapped = self._legacy.get(path)
            tensor = _read_safetensor(path, name) if mapped is None else mapped[name]
        return self._checked(name, tensor)

    def read_slice(self, name: str, index: int) -> Tensor:
        """Read slice ``index`` of the first dimension of a tensor on disk.

        A tensor that has to be computed is kept until another one is read, because slices are read
        in turn.

        Raises:
            SourceError, NumericalError: as for :meth:`read`.
        """
        path = self.where[name]
        if name in self.recipes or path in self._legacy:
            whole = self._last.get(name)
            if whole is None:
                whole = self.read(name)
                self._last.clear()
                self._last[name] = whole
            return whole[index].clone()
        tensor = _read_safetensor(path, name, index)
        return self._checked(name, tensor)

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self.unchecked and (bad := _not_finite(tensor)):
            file = self.where[name].name
            raise NumericalError(
                f"{name} in {file} contains {bad} values that are NaN or infinite.",
                "The model is damaged: download it again or use another checkpoint.",
            )
        return tensor


def _not_finite(tensor: Tensor) -> int:
    """Return the number of NaN or infinite values. Works in chunks, because a check of the whole
    tensor would take 2.5 times its memory."""
    # torch does not support the check for all 8-bit dtypes; they are checked once dequantized.
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        return 0
    parts = tensor.reshape(-1).split(_CHECKED)
    return sum(int((~part.isfinite()).sum()) for part in parts if not bool(part.isfinite().all()))


def _read_safetensor(path: Path, name: str, index: int | None = None) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name) if index is None else file.get_slice(name)[index]
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"Cannot read {name} from {path}: {reason(error)}", "Download the file again."
        ) from error
    return tensor


def open_weights(folder: Path) -> Weights:
    """Open the weights of a folder: safetensors or ``.bin``, single or sharded.

    Raises:
        SourceError: there are no weights, a shard is missing, or a file is damaged.
    """
    files = _weight_files(folder)
    if not files:
        raise SourceError(
            f"{folder} has no weights ({SINGLE}, pytorch_model.bin or a shard index).",
            "Give the folder that contains the weights.",
        )
    return _opened(files)


def open_file(path: Path) -> Weights:
    """Open the tensors of one safetensors or ``.bin`` file. Raises SourceError."""
    return _opened([path])


def _opened(files: Sequence[Path]) -> Weights:
    infos: dict[str, TensorInfo] = {}
    where: dict[str, Path] = {}
    legacy: dict[Path, dict[str, Tensor]] = {}
    for path in files:
        if path.suffix == ".bin":
            legacy[path] = _map_bin(path)
            found = {name: _info(tensor) for name, tensor in legacy[path].items()}
        else:
            found = read_header(path).tensors
        infos.update(found)
        where.update(dict.fromkeys(found, path))
    if not infos:
        raise SourceError(
            f"The weight files in {files[0].parent} have no tensors.", "Download the model again."
        )
    return Weights(infos, where, legacy)


def has_weights(folder: Path) -> bool:
    """Return whether a folder contains weight files or a shard index."""
    return any((folder / name).is_file() for layout in LAYOUTS for name in layout)


def _weight_files(folder: Path) -> list[Path]:
    for index, single in LAYOUTS:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _indexed(folder / index)
    return []


def shard_files(index: Path) -> list[str]:
    """Return the names of the shards that an index lists. Raises SourceError."""
    try:
        names = {Path(name).as_posix() for name in read_json(index)["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{index} is not a valid shard index.", "Download it again.") from error
    for name in sorted(names):
        # Names from a file must not point outside the folder.
        path = Path(name)
        if not path.name or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise SourceError(
                f"{index} names the shard '{name}', which is not a file in its folder.",
                "Download the model again; do not use this one if you do not trust its author.",
            )
    return sorted(names)


def _indexed(index: Path) -> list[Path]:
    files = [index.parent / name for name in shard_files(index)]
    if missing := [path.name for path in files if not path.is_file()]:
        raise SourceError(
            f"{index.parent} lacks {len(missing)} of {len(files)} shards, such as {missing[0]}.",
            "Download the model again.",
        )
    return files


def _map_bin(path: Path) -> dict[str, Tensor]:
    """Memory-map a pickled state dict; ``weights_only`` rejects any code in it."""
    import pickle
    import zipfile

    import torch

    from hisvd_cli.modeling.pickles.foreign import read_foreign
    from hisvd_cli.utils.library_errors import library_errors

    hint = "Download it again, or convert the model to safetensors."
    read_foreign(path)  # first: checks the declared sizes, which torch would trust
    # Files from before PyTorch 1.6 are not zip archives and cannot be memory-mapped.
    mapped = zipfile.is_zipfile(path)
    with library_errors(lambda why: SourceError(f"Cannot read {path}: {why}", hint)):
        try:
            state = torch.load(path, "cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise SourceError(
                f"{path} is damaged, or contains more than tensors; no code in it was run.", hint
            ) from error
    if not isinstance(state, dict):
        raise SourceError(f"{path} is not a state dict.", "Convert the model to safetensors.")
    found = {str(name): each for name, each in state.items() if isinstance(each, torch.Tensor)}
    check_plain(path, found, hint)
    return found


def check_plain(path: Path, tensors: Mapping[str, Tensor], hint: str) -> None:
    """Raise SourceError if a tensor of a pickle is sparse, quantized or without data, or has more
    values than its storage."""
    import torch

    for name, tensor in tensors.items():
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or type(tensor) is not torch.Tensor:
            raise SourceError(f"{name} in {path} is not a plain tensor.", hint)
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise SourceError(f"{name} in {path} has more values than its storage.", hint)


def _info(tensor: Tensor) -> TensorInfo:
    dtype = dtype_name(tensor.dtype)
    return TensorInfo(dtype, tuple(tensor.shape), 0, tensor.numel() * tensor.element_size())
