"""Audit a `.pt` file that another tool wrote, without running anything that is in it.

SVD-LLM, HiSVD and ZS-SVD pickle whole models, whose classes exist only in their repositories.
`read_foreign` reads names, shapes, dtypes and sizes through `unpickle.Machine`, which builds inert
records; `find_pairs` recognises the low-rank factors by name and shape.

A global that `problems` names is one that obviously runs code where other tools load the file. No
such list can be complete: a file without one may still be unsafe for `torch.load`.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hisvd_cli.modeling.pickles.unpickle import (
    BoundedReader,
    Global,
    Machine,
    Node,
    RefusedError,
    Tensor,
    check_inflated,
    clean,
)
from hisvd_cli.utils.errors import SourceError

_ZIP_START = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_DEPTH = 500
_MAX_NAME = 1000
_MAX_VISITS = 5_000_000
_FREE_VISITS, _VISITS_PER_OPERATION = 10_000, 4
"""How many objects are looked at: each as often as it is named, which is not often."""
_MAX_CHARACTERS = 1 << 27
_MAX_REPORTED_GLOBALS = 20

_DAMAGE = (
    *(ValueError, OverflowError, EOFError, OSError, NotImplementedError),
    *(struct.error, zlib.error, zipfile.BadZipFile),
)

_WRAPPERS = ("model", "state_dict", "model_state_dict")

# (name of U, name of V): siblings that differ in this alone, as a whole part of the dotted name
# ("q_proj.u_proj") or as one word of it ("q_u_proj"). Which of A and B is U, the shapes tell.
_TOKENS = (
    ("u_proj", "v_proj"),
    ("linear_u", "linear_v"),
    ("ALinear", "BLinear"),
    ("weight_u", "weight"),
    ("u", "v"),
    ("U", "V"),
    ("A", "B"),
)

_CODE_MODULE = re.compile(
    "_?(os|posix|nt|sys|subprocess|posixsubprocess|commands|shutil|pty|socket|socketserver|asyncio"
    "|multiprocessing|thread|signal|importlib|frozen_importlib|imp|pkgutil|runpy|zipimport|site"
    "|pickle|dill|cloudpickle|joblib|marshal|shelve|ctypes|cffi|code|codeop|pdb|bdb|timeit|cProfile"
    "|profile|trace|doctest|pydoc|webbrowser|urllib|requests|http|ftplib|smtplib|pip|ensurepip|venv"
    "|distutils|setuptools|idlelib|lib2to3|gc)|__(builtins|globals|subclasses|loader)__"
)
_CODE_CALL = re.compile(
    r"builtins\.(eval|exec|execfile|compile|open|input|breakpoint|__import__|apply|getattr|setattr"
    r"|delattr|globals|locals|vars|__build_class__)(\..*)?"
    r"|_?operator\.(attrgetter|methodcaller)|types\.(FunctionType|CodeType)|numpy\.load"
    r"|pandas\.read_pickle|torch\.(serialization\.|hub\.)?load|torch\.storage\._load_from_bytes"
    r"|torch\.(ops|classes)\.load_library"
)


@dataclass(frozen=True)
class ForeignTensor:
    """One named tensor of the file; tensors with one `storage` share their data."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    storage: str = ""
    storage_bytes: int = 0


@dataclass(frozen=True)
class LowRankPair:
    """Two tensors U `[m, r]` and V `[r, n]` that stand for one dense matrix.

    Attributes:
        name: the matrix's name, such as "model.layers.0.self_attn.q_proj".
        shape: (m, n).
        u, v: the names of the two tensors.
    """

    name: str
    layer: int | None
    cluster: str
    shape: tuple[int, int]
    rank: int
    dtype: str
    u: str
    v: str


@dataclass(frozen=True)
class ForeignCheckpoint:
    """What a foreign file holds.

    Attributes:
        classes: module path to class name, as the file records them.
        globals_seen: every global that the file names.
        problems: what a reader should know before loading the file elsewhere.
    """

    path: Path
    tensors: dict[str, ForeignTensor]
    classes: dict[str, str]
    globals_seen: tuple[str, ...]
    file_bytes: int
    problems: tuple[str, ...]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of tensor data in the file; data that several tensors share counts once."""
        return sum({t.storage: t.storage_bytes for t in self.tensors.values()}.values())


def read_foreign(path: Path) -> ForeignCheckpoint:
    """Read names, shapes, dtypes and sizes of a `torch.save` file; run nothing that is in it.

    Raises:
        SourceError: the file is missing, damaged, no torch checkpoint, or refused.
    """
    machine = Machine(0)
    try:
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            machine = Machine(file_bytes)
            read = _read_zip if file.read(4) == _ZIP_START else _read_legacy
            file.seek(0)
            root, problems = read(file, file_bytes, machine)
        walk = _Walk(root, machine.operations)
    except _DAMAGE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        message = f"{path} is not a readable torch checkpoint: {clean(reason)}"
        raise SourceError(message, _hint(machine)) from error
    tensors = {name: _foreign(name, tensor) for name, tensor in walk.tensors.items()}
    problems = [*_code_problems(machine), *problems, *_data_problems(walk, machine)]
    seen = tuple(sorted({named.path for named in machine.globals.values()}))
    return ForeignCheckpoint(path, tensors, walk.classes, seen, file_bytes, tuple(problems))


def _hint(machine: Machine) -> str:
    named = _runners(machine)
    if named:
        several = ", ".join(f"`{path}`" for path in named[:3])
        return f"It names {several}: load it with no other tool. Nothing was executed here."
    return "Download or save it again. Files of torch.save are read, both zip and legacy format."


def _foreign(name: str, tensor: Tensor) -> ForeignTensor:
    nbytes = math.prod(tensor.shape) * tensor.item_size
    storage = tensor.storage
    return ForeignTensor(name, tensor.shape, tensor.dtype, nbytes, storage.key, storage.nbytes)


# The two formats.


def _read_zip(file: BinaryIO, size: int, machine: Machine) -> tuple[object, list[str]]:
    with zipfile.ZipFile(file) as archive:
        entry = _pickle_entry(archive)
        check_inflated(entry.file_size, size)
        with archive.open(entry) as stream:
            root = machine.load(BoundedReader(stream, entry.file_size))
            stream.read(1)  # at the end of the entry, this is what checks its CRC
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    folder = entry.filename.removesuffix("data.pkl")
    wrong = [
        storage.key
        for storage in machine.storages.values()
        if sizes.get(f"{folder}data/{storage.key}", 0) != storage.nbytes
    ]
    problems = []
    if wrong:
        problems.append(f"{len(wrong)} storages are missing or misfit, such as `{wrong[0]}`")
    if any(name.startswith(f"{folder}code/") for name in sizes):
        problems.append("a TorchScript archive: it holds code, which other tools compile")
    return root, problems


def _pickle_entry(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    entries = [i for i in archive.infolist() if re.fullmatch(r"[^/]+/data\.pkl", i.filename)]
    if len(entries) != 1:
        raise RefusedError(f"a zip file with {len(entries)} data.pkl, where torch writes one")
    entry = entries[0]
    if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise RefusedError("its data.pkl is encrypted or compressed in an unusual way")
    return entry


def _read_legacy(file: BinaryIO, size: int, machine: Machine) -> tuple[object, list[str]]:
    reader = BoundedReader(file, size)
    if machine.load(reader) != _LEGACY_MAGIC:
        raise RefusedError("a plain pickle, without torch's magic number")
    machine.load(reader)  # protocol version
    machine.load(reader)  # sizes of the writer's C types
    root = machine.load(reader)
    keys = machine.load(reader)
    listed = (keys.items or []) if isinstance(keys, Node) else []
    stored = {key for key in listed if isinstance(key, str)}
    needed = sum(8 + s.nbytes for s in machine.storages.values() if s.key in stored)
    missing = [key for key in machine.storages if key not in stored]
    if size - reader.tell() < needed:
        raise RefusedError(f"it ends {needed - size + reader.tell():,} bytes too early")
    problems = [f"{len(missing)} storages are missing, such as `{missing[0]}`"] if missing else []
    return root, problems


# What to report.


def _runs_code(named: Global) -> bool:
    # Protocol 4 reaches a module through any other that imports it: "torch.hub" "os.system".
    parts = (named.module.partition(".")[0], *named.name.split("."))
    return bool(_CODE_CALL.fullmatch(named.path)) or any(map(_CODE_MODULE.fullmatch, parts))


def _runners(machine: Machine) -> list[str]:
    return sorted({named.path for named in machine.globals.values() if _runs_code(named)})


def _code_problems(machine: Machine) -> list[str]:
    named = _runners(machine)
    problems = [
        f"names `{path}`, which runs code when loaded by other tools; nothing was executed here"
        for path in named[:_MAX_REPORTED_GLOBALS]
    ]
    if len(named) > len(problems):
        problems.append(f"names {len(named) - len(problems)} more of the kind")
    if machine.altered:
        first = next(iter(machine.altered))
        problems.append(f"sets attributes of `{first}` itself, which was not done here")
    return problems


def _data_problems(walk: _Walk, machine: Machine) -> list[str]:
    problems = []
    beyond = [name for name, tensor in walk.tensors.items() if _end(tensor) > tensor.storage.nbytes]
    if beyond:
        problems.append(f"{len(beyond)} tensors reach past their data, such as `{beyond[0]}`")
    listed = {tensor.storage.key for tensor in walk.tensors.values()}
    unlisted = [s.nbytes for key, s in machine.storages.items() if key not in listed]
    if unlisted:
        total = f"{sum(unlisted):,} bytes"
        problems.append(f"{len(unlisted)} storages ({total}) belong to no tensor that was found")
    return problems + walk.problems


def _end(tensor: Tensor) -> int:
    if 0 in tensor.shape:
        return 0
    strides = zip(tensor.shape, tensor.stride, strict=True)
    last = tensor.offset + sum((size - 1) * step for size, step in strides)
    return (last + 1) * tensor.item_size


# Names, from the state of the module stand-ins.


@dataclass(frozen=True, slots=True)
class _Visit:
    name: str
    value: object
    depth: int = 0
    module: bool = False  # may be seen again under another name, as a shared submodule is
    extra: bool = False  # an attribute: a tensor that was listed by its real name is not repeated


class _Walk:
    """Names every tensor below the root: parameters, buffers and submodules, attributes last."""

    def __init__(self, root: object, operations: int) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.classes: dict[str, str] = {}
        self.problems: list[str] = []
        self._repeats: dict[str, int] = {}
        self._listed: set[int] = set()  # of tensors, by identity: the file's values have no hash
        self._seen: set[int] = set()
        self._later: deque[_Visit] = deque()
        self._run(root, min(_MAX_VISITS, _FREE_VISITS + _VISITS_PER_OPERATION * operations))

    def _run(self, root: object, limit: int) -> None:
        stack = [_Visit("", root, module=True)]
        visits = deep = characters = 0
        while stack or self._later:
            visit = stack.pop() if stack else self._later.popleft()
            visits += 1
            if visits > limit:
                raise RefusedError(f"more than {limit:,} objects, or one inside itself")
            if visit.depth > _MAX_DEPTH:
                deep += 1
                continue
            children = list(self._children(visit))
            characters += sum(len(child.name) for child in children)
            if characters > _MAX_CHARACTERS:
                raise RefusedError(f"its names have more than {_MAX_CHARACTERS:,} characters")
            stack += reversed(children)
        if deep:
            self.problems.append(f"{deep} objects lie deeper than {_MAX_DEPTH} levels: not read")

    def _children(self, visit: _Visit) -> Iterator[_Visit]:
        value = visit.value
        if isinstance(value, Tensor):
            self._add(visit.name or "tensor", value, visit.extra)
        if id(value) in self._seen and not visit.module:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            yield from _states(visit, value)
        elif isinstance(value, tuple):
            yield from _below(visit, enumerate(value))
        elif isinstance(value, Node):
            fields = _fields(value)
            if all(isinstance(fields.get(name), Node) for name in ("_parameters", "_modules")):
                yield from self._module(visit, value, fields)
            else:
                yield from _object(visit, value)

    def _module(self, visit: _Visit, node: Node, fields: dict[object, object]) -> Iterator[_Visit]:
        self.classes[visit.name] = node.kind
        for name in ("_parameters", "_buffers", "_modules"):
            yield from _below(visit, _entries(fields.pop(name, None)), module=name == "_modules")
        self._later.extend(_below(visit, fields.items(), extra=True))

    def _add(self, name: str, tensor: Tensor, extra: bool) -> None:
        if extra and id(tensor) in self._listed:
            return
        self._listed.add(id(tensor))
        if name in self.tensors:
            self._repeats[name] = self._repeats.get(name, 1) + 1
            name = f"{name}#{self._repeats[name]}"
        self.tensors[name] = tensor


def _object(visit: _Visit, node: Node) -> Iterator[_Visit]:
    """Yield what a container or an instance holds."""
    for key, value in _entries(node):
        if visit.depth == 0 and key in _WRAPPERS and isinstance(value, Node):
            yield _Visit("", value, 1, module=True)
        else:
            yield from _below(visit, [(key, value)])
    yield from _below(visit, enumerate(node.items or ()))
    yield from _below(visit, enumerate(node.args), extra=True)
    yield from _states(visit, node)


def _below(
    visit: _Visit,
    pairs: Iterable[tuple[object, object]],
    *,
    module: bool = False,
    extra: bool = False,
) -> Iterator[_Visit]:
    for key, value in pairs:
        if _may_hold_tensors(value):
            name = _joined(visit.name, key)
            yield _Visit(name, value, visit.depth + 1, module, extra or visit.extra)


def _states(visit: _Visit, holder: Node | Tensor) -> Iterator[_Visit]:
    for part in _state_parts(holder):
        if _may_hold_tensors(part):
            yield _Visit(visit.name, part, visit.depth + 1, extra=True)


def _state_parts(holder: Node | Tensor) -> Iterator[object]:
    for state in holder.states or ():
        yield from state if isinstance(state, tuple) else (state,)  # (__dict__, slots)


def _may_hold_tensors(value: object) -> bool:
    if isinstance(value, tuple):
        return any(isinstance(item, Node | Tensor | tuple) for item in value)
    return isinstance(value, Node | Tensor)


def _entries(value: object) -> list[tuple[object, object]]:
    return (value.entries or []) if isinstance(value, Node) else []


def _fields(node: Node) -> dict[object, object]:
    """Return an instance's attributes."""
    pairs = [pair for part in _state_parts(node) for pair in _entries(part)]
    return {key: value for key, value in pairs if isinstance(key, str)}


def _joined(prefix: str, key: object) -> str:
    if isinstance(key, str):
        part = clean(key)
    elif isinstance(key, int) and abs(key) < 1 << 63:
        part = str(key)
    else:
        part = f"<{type(key).__name__}>"
    return f"{prefix}.{part}"[-_MAX_NAME:] if prefix else part


# Low-rank pairs, by name and shape.


def find_pairs(checkpoint: ForeignCheckpoint) -> tuple[list[LowRankPair], list[ForeignTensor]]:
    """Find the low-rank pairs, and the 2-D weights of decoder blocks that are in none.

    A pair has two names that differ in one u/v-like token and an inner dimension in common that
    is smaller than the matrix it stands for. Names come out as `transformers` has them:
    "q_u_proj" and "q_proj.u_proj" are both "q_proj".
    """
    pairs: list[LowRankPair] = []
    used: set[str] = set()
    for name, tensor in checkpoint.tensors.items():
        for partner, base in _partners(name):
            other = checkpoint.tensors.get(partner)
            if other is None or used & {name, partner}:
                continue
            pair = _pair(base, tensor, other)
            if pair is not None:
                pairs.append(pair)
                used |= {name, partner}
    dense = [t for t in checkpoint.tensors.values() if t.name not in used]
    return pairs, [t for t in dense if _is_block_linear(t, checkpoint.classes)]


def _partners(name: str) -> Iterator[tuple[str, str]]:
    """Yield the name of V and of the dense matrix for each way in which `name` may be a U."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        for partner, base in _part_partners(part):
            dense = [*parts[:i], *([base] if base else []), *parts[i + 1 :]]
            if dense[-1:] == ["weight"]:
                dense.pop()
            yield ".".join([*parts[:i], partner, *parts[i + 1 :]]), ".".join(dense)


def _part_partners(part: str) -> list[tuple[str, str]]:
    for u, v in _TOKENS:
        if part == u:
            return [(v, "")]
    words = part.split("_")
    found = []
    for i, word in enumerate(words):
        for v in (v for u, v in _TOKENS if u == word):
            base = "_".join([*words[:i], *words[i + 1 :]])
            base = re.sub(r"^(fc\d+)_proj$", r"\1", base)  # SVD-LLM makes fc1_u_proj of OPT's fc1
            found.append(("_".join([*words[:i], v, *words[i + 1 :]]), base))
    return found


def _pair(name: str, first: ForeignTensor, second: ForeignTensor) -> LowRankPair | None:
    if len(first.shape) != 2 or len(second.shape) != 2 or not name:
        return None
    orders = [(u, v) for u, v in ((first, second), (second, first)) if u.shape[1] == v.shape[0]]
    if not orders:
        return None
    u, v = min(orders, key=lambda order: order[0].shape[1])
    m, r, n = u.shape[0], u.shape[1], v.shape[1]
    if r >= max(m, n) or 0 in (m, n, r):
        return None
    parts = name.split(".")
    return LowRankPair(name, _layer(parts), parts[-1], (m, n), r, u.dtype, u.name, v.name)


def _layer(parts: list[str]) -> int | None:
    return next((int(part) for part in parts if re.fullmatch(r"[0-9]{1,6}", part)), None)


def _is_block_linear(tensor: ForeignTensor, classes: dict[str, str]) -> bool:
    *module, last = tensor.name.split(".")
    return (
        last == "weight"
        and len(tensor.shape) == 2
        and min(tensor.shape) > 1
        and _layer(module) is not None
        and not classes.get(".".join(module), "").endswith("Embedding")
    )
