"""The tensors of a model folder, found by name and read one at a time."""

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
"""(index of shards, single file) in the order of preference. Of a layout that lies there in both
forms the single file is read, as transformers does it."""
_CHECKED = 1 << 22
"""Values that are checked at a time."""


@dataclass(frozen=True)
class Weights:
    """Tensors of one folder.

    Attributes:
        infos: name → dtype, shape and byte range, for every tensor on disk.
        where: name → file.
        recipes: name → what makes a tensor that is not stored as it is read, such as one that is
            dequantized.
        parts: files that recipes read, beside those of ``where``.
    """

    infos: dict[str, TensorInfo]
    where: dict[str, Path]
    _legacy: dict[Path, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    recipes: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict, repr=False)
    parts: tuple[Path, ...] = ()

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
        """The floating-point dtype that most of the tensors have, of all dtypes where there is
        none. Raises SourceError where torch has no such dtype."""
        sizes: dict[str, int] = {}
        for info in self.infos.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        floats = {dtype: size for dtype, size in sizes.items() if "float" in dtype} or sizes
        import torch

        dtype = max(floats, key=lambda dtype: floats[dtype])
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise SourceError(
                f"{self.files[0].parent} stores its weights as {dtype}, which torch does not have.",
                "Use a version of the model in float32, float16 or bfloat16.",
            )
        return dtype

    def __contains__(self, name: object) -> bool:
        return name in self.where

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def read(self, name: str) -> Tensor:
        """Read one tensor to the CPU.

        Raises:
            SourceError: the file is damaged.
            NumericalError: the tensor holds NaN or infinity.
        """
        path = self.where[name]
        if recipe := self.recipes.get(name):
            tensor = recipe()
        else:
            mapped = self._legacy.get(path)
            tensor = _read_safetensor(path, name) if mapped is None else mapped[name]
        if bad := _not_finite(tensor):
            raise NumericalError(
                f"{name} in {path.name} holds {bad} values that are NaN or infinite.",
                "The model itself is damaged: fetch it again or use another checkpoint.",
            )
        return tensor


def _not_finite(tensor: Tensor) -> int:
    """Return how many values are NaN or infinite. Looking at all of a tensor at once would take
    two and a half times its memory."""
    # Numbers of 8 bits are checked once they are dequantized: torch cannot tell of all of them.
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        return 0
    parts = tensor.reshape(-1).split(_CHECKED)
    return sum(int((~part.isfinite()).sum()) for part in parts if not bool(part.isfinite().all()))


def _read_safetensor(path: Path, name: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"Cannot read {name} from {path}: {reason(error)}", "Fetch the file again."
        ) from error
    return tensor


def open_weights(folder: Path) -> Weights:
    """Index the weights of a folder: safetensors, sharded or single, else ``.bin`` files.

    Raises:
        SourceError: no weights, a missing shard, or a damaged file.
    """
    files = _weight_files(folder)
    if not files:
        raise SourceError(
            f"{folder} holds no weights ({SINGLE} or pytorch_model.bin, or an index of shards).",
            "Give the folder that holds the weights.",
        )
    return _opened(files)


def open_file(path: Path) -> Weights:
    """Index the tensors of one file, safetensors or ``.bin``. Raises SourceError."""
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
            f"The weights of {files[0].parent} hold no tensors.", "Fetch the model again."
        )
    return Weights(infos, where, legacy)


def has_weights(folder: Path) -> bool:
    """Tell whether weights lie in a folder, whole or not."""
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
        raise SourceError(f"{index} is not a valid shard index.", "Fetch it again.") from error
    for name in sorted(names):
        # A name from a file must not lead out of the folder.
        path = Path(name)
        if not path.name or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise SourceError(
                f"{index} names the shard '{name}', which is not a file of its folder.",
                "Fetch the model again; do not use this one if you do not know its author.",
            )
    return sorted(names)


def _indexed(index: Path) -> list[Path]:
    files = [index.parent / name for name in shard_files(index)]
    if missing := [path.name for path in files if not path.is_file()]:
        raise SourceError(
            f"{index.parent} lacks {len(missing)} of {len(files)} shards, such as {missing[0]}.",
            "Fetch the model again.",
        )
    return files


def _map_bin(path: Path) -> dict[str, Tensor]:
    """Map a pickled state dict into memory; ``weights_only`` refuses any code in it."""
    import pickle
    import zipfile

    import torch

    from hisvd_cli.modeling.pickles.foreign import read_foreign
    from hisvd_cli.utils.library_errors import library_errors

    hint = "Fetch it again, or convert the model to safetensors."
    read_foreign(path)  # first: it holds what it declares, which torch would believe
    # Files from before PyTorch 1.6 are no archives, and cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    with library_errors(lambda why: SourceError(f"Cannot read {path}: {why}", hint)):
        try:
            state = torch.load(path, "cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise SourceError(
                f"{path} is damaged, or holds more than tensors; no code in it was run.", hint
            ) from error
    if not isinstance(state, dict):
        raise SourceError(f"{path} holds no state dict.", "Convert the model to safetensors.")
    found = {str(name): each for name, each in state.items() if isinstance(each, torch.Tensor)}
    check_plain(path, found, hint)
    return found


def check_plain(path: Path, tensors: Mapping[str, Tensor], hint: str) -> None:
    """Raise SourceError where a tensor of a pickle is no plain one: sparse, packed, without data,
    or of more numbers than its data has."""
    import torch

    for name, tensor in tensors.items():
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or type(tensor) is not torch.Tensor:
            raise SourceError(f"{name} in {path} is not a plain tensor.", hint)
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise SourceError(f"{name} in {path} has more numbers than the file.", hint)


def _info(tensor: Tensor) -> TensorInfo:
    dtype = dtype_name(tensor.dtype)
    return TensorInfo(dtype, tuple(tensor.shape), 0, tensor.numel() * tensor.element_size())
