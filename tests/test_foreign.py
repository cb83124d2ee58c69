"""Foreign `.pt` files are read as torch reads them, and a crafted one cannot run anything."""

from __future__ import annotations

import codecs
import functools
import io
import pickle
import random
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from hisvd_cli.modeling.pickles import bounded_reader, tensor_names, unpickle
from hisvd_cli.modeling.pickles.foreign import ForeignCheckpoint, ForeignTensor, read_foreign
from hisvd_cli.modeling.pickles.low_rank_pairs import find_pairs
from hisvd_cli.utils.errors import SourceError

# The legacy format wants the classes' source, which those made below do not have.
pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
HIDDEN, INNER, KV = 12, 20, 4

# Models of classes that exist while they are saved and are gone when they are read.


def _linear_pair(m: int, n: int, rank: int, bias: bool = False) -> tuple[nn.Linear, nn.Linear]:
    return nn.Linear(rank, m, bias=bias), nn.Linear(n, rank, bias=False)


def _svd_llm_init(self: nn.Module) -> None:
    """SVD-LLM's way: both factors are children of the attention or the MLP."""
    nn.Module.__init__(self)
    shapes = {"q": (HIDDEN, HIDDEN), "k": (KV, HIDDEN), "v": (KV, HIDDEN), "o": (HIDDEN, HIDDEN)}
    for rank, (name, (m, n)) in enumerate(shapes.items(), start=1):
        u, v = _linear_pair(m, n, rank)
        setattr(self, f"{name}_u_proj", u)
        setattr(self, f"{name}_v_proj", v)
    self.register_buffer("inv_freq", torch.ones(3), persistent=False)


def _mlp_init(self: nn.Module) -> None:
    nn.Module.__init__(self)
    for name, (m, n) in {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN)}.items():
        u, v = _linear_pair(m, n, 3)
        setattr(self, f"{name}_u_proj", u)
        setattr(self, f"{name}_v_proj", v)
    self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)


def _block_init(self: nn.Module) -> None:
    nn.Module.__init__(self)
    module = sys.modules["component.svd_llama"]
    self.self_attn = module.SVD_LlamaAttention()
    self.mlp = module.SVD_LlamaMLP()
    self.norm = nn.LayerNorm(HIDDEN)


def _model_init(self: nn.Module, layers: int = 2) -> None:
    nn.Module.__init__(self)
    module = sys.modules["component.svd_llama"]
    self.embed_tokens = nn.Embedding(30, HIDDEN)
    self.layers = nn.ModuleList(module.SVD_Block() for _ in range(layers))
    self.lm_head = nn.Linear(HIDDEN, 30, bias=False)
    self.lm_head.weight = self.embed_tokens.weight


@pytest.fixture
def component() -> Iterator[types.ModuleType]:
    """Provide the module `component.svd_llama` with the classes of SVD-LLM."""
    names = ("component", "component.svd_llama")
    package, module = (types.ModuleType(name) for name in names)
    package.svd_llama = module  # type: ignore[attr-defined]
    makers = {
        "SVD_LlamaAttention": _svd_llm_init,
        "SVD_LlamaMLP": _mlp_init,
        "SVD_Block": _block_init,
        "SVD_Model": _model_init,
    }
    for name, init in makers.items():
        cls = type(name, (nn.Module,), {"__init__": init, "__module__": names[1]})
        setattr(module, name, cls)
    sys.modules.update(zip(names, (package, module), strict=True))
    yield module
    for name in names:
        sys.modules.pop(name, None)


def _saved(path: Path, value: object, zipped: bool = True, protocol: int = 2) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return path


def _forget() -> None:
    for name in ("component.svd_llama", "component"):
        del sys.modules[name]


def _assert_same(checkpoint: ForeignCheckpoint, state: dict[str, torch.Tensor]) -> None:
    found = {name: checkpoint.tensors[name] for name in state}
    for name, tensor in state.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        assert (found[name].shape, found[name].dtype) == (tuple(tensor.shape), dtype)
        assert found[name].nbytes == tensor.nbytes
        assert found[name].name == name


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_svd_llm_model_without_its_classes(
    tmp_path: Path, component: types.ModuleType, zipped: bool, protocol: int
) -> None:
    model = component.SVD_Model().half()
    value = {"model": model, "tokenizer": {"vocab": {"a": 0}, "merges": [("a", "b")]}}
    path = _saved(tmp_path / "m.pt", value, zipped, protocol)
    state = model.state_dict()
    _forget()

    checkpoint = read_foreign(path)

    _assert_same(checkpoint, state)
    buffers = {f"layers.{i}.self_attn.inv_freq" for i in range(2)}
    assert set(checkpoint.tensors) == {*state, *buffers}
    assert checkpoint.classes[""] == "component.svd_llama.SVD_Model"
    assert checkpoint.classes["layers.1.self_attn"] == "component.svd_llama.SVD_LlamaAttention"
    assert "component.svd_llama.SVD_LlamaMLP" in checkpoint.globals_seen
    assert list(checkpoint.globals_seen) == sorted(checkpoint.globals_seen)
    assert checkpoint.problems == ()
    assert checkpoint.file_bytes == path.stat().st_size
    assert "component" not in sys.modules


@FORMATS
def test_pairs_of_svd_llm_model(tmp_path: Path, component: types.ModuleType, zipped: bool) -> None:
    path = _saved(tmp_path / "m.pt", component.SVD_Model().bfloat16(), zipped)
    _forget()

    pairs, dense = find_pairs(read_foreign(path))

    found = {pair.name: pair for pair in pairs}
    assert len(found) == len(pairs) == 12
    key = found["layers.1.self_attn.k_proj"]
    assert (key.layer, key.cluster, key.shape, key.rank) == (1, "k_proj", (KV, HIDDEN), 2)
    assert (key.u, key.v) == (
        "layers.1.self_attn.k_u_proj.weight",
        "layers.1.self_attn.k_v_proj.weight",
    )
    assert key.dtype == "bfloat16"
    assert found["layers.0.self_attn.v_proj"].rank == 3
    assert found["layers.0.mlp.gate_proj"].shape == (INNER, HIDDEN)
    assert [t.name for t in dense] == [f"layers.{i}.mlp.down_proj.weight" for i in range(2)]


@FORMATS
def test_tied_and_sliced_tensors_count_once(tmp_path: Path, zipped: bool) -> None:
    weight = torch.zeros(6, 4)
    value = {"a.weight": weight, "b.weight": weight, "c.weight": weight[:2], "d": torch.zeros(3)}
    checkpoint = read_foreign(_saved(tmp_path / "m.pt", value, zipped))

    assert list(checkpoint.tensors) == list(value)
    assert checkpoint.tensors["c.weight"].nbytes == 2 * 4 * 4
    assert checkpoint.tensor_bytes == weight.nbytes + 12


@FORMATS
@pytest.mark.parametrize("wrapper", ["", "model", "state_dict"])
def test_plain_state_dict(
    tmp_path: Path, component: types.ModuleType, zipped: bool, wrapper: str
) -> None:
    state = component.SVD_Model().state_dict()
    value = {wrapper: state, "step": 3, "lr": 0.1} if wrapper else state
    checkpoint = read_foreign(_saved(tmp_path / "m.pt", value, zipped))

    _assert_same(checkpoint, state)
    assert list(checkpoint.tensors) == list(state)
    assert checkpoint.classes == {}
    assert len(find_pairs(checkpoint)[0]) == 12


def test_nested_containers_attributes_and_dtypes(tmp_path: Path) -> None:
    block = nn.Linear(2, 2, bias=False)
    block.__dict__.update(mask=torch.ones(2, dtype=torch.bool), alias=[block.weight])
    value = {
        "net": block,
        3: [torch.zeros(1, dtype=torch.int64), (torch.zeros(2, dtype=torch.float8_e4m3fn),)],
        "scalar": torch.tensor(1.0, dtype=torch.float64),
        "empty": torch.zeros(0, 5),
        "view": torch.zeros(2, 3).t(),
        "complex": torch.zeros(1, dtype=torch.complex64),
        "other": torch.zeros(2, dtype=torch.uint16),
    }
    tensors = read_foreign(_saved(tmp_path / "m.pt", value)).tensors

    found = {name: (t.shape, t.dtype) for name, t in tensors.items()}
    assert found == {
        "net.weight": ((2, 2), "float32"),
        "net.mask": ((2,), "bool"),
        "3.0": ((1,), "int64"),
        "3.1.0": ((2,), "float8_e4m3fn"),
        "scalar": ((), "float64"),
        "empty": ((0, 5), "float32"),
        "view": ((3, 2), "float32"),
        "complex": ((1,), "complex64"),
        "other": ((2,), "uint16"),
    }


def test_parameter_with_attributes_and_shared_module(tmp_path: Path) -> None:
    shared = nn.Linear(3, 2)
    shared.weight.note = torch.zeros(5)  # type: ignore[attr-defined]
    model = nn.Sequential(shared, nn.ReLU(), shared)
    checkpoint = read_foreign(_saved(tmp_path / "m.pt", model))

    _assert_same(checkpoint, model.state_dict())
    assert set(checkpoint.tensors) - set(model.state_dict()) == {"0.weight.note"}
    assert checkpoint.tensor_bytes == (6 + 2 + 5) * 4


def test_single_tensor(tmp_path: Path) -> None:
    checkpoint = read_foreign(_saved(tmp_path / "m.pt", torch.zeros(2, 3)))
    assert [t.shape for t in checkpoint.tensors.values()] == [(2, 3)]


@FORMATS
def test_transformers_model_with_tokenizer(tmp_path: Path, zipped: bool) -> None:
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    tokenizer: object = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    value = {"model": model, "tokenizer": tokenizer}
    checkpoint = read_foreign(_saved(tmp_path / "m.pt", value, zipped))

    _assert_same(checkpoint, model.state_dict())
    buffers = {name for name, _ in model.named_buffers()}
    assert set(checkpoint.tensors) == {*model.state_dict(), *buffers}
    held = [*model.parameters(), *model.buffers()]
    assert checkpoint.tensor_bytes == sum(t.nbytes for t in held)
    pairs, dense = find_pairs(checkpoint)
    assert (pairs, len(dense)) == ([], 14)
    assert checkpoint.problems == ()


# Pairs.


def _checkpoint(shapes: Mapping[str, tuple[int, ...]], **classes: str) -> ForeignCheckpoint:
    tensors = {name: ForeignTensor(name, shape, "float16", 0) for name, shape in shapes.items()}
    return ForeignCheckpoint(Path("x.pt"), tensors, classes, (), 0, ())


@pytest.mark.parametrize(
    ("u", "v", "name"),
    [
        ("l.0.attn.q_u_proj.weight", "l.0.attn.q_v_proj.weight", "l.0.attn.q_proj"),
        ("l.0.attn.v_u_proj.weight", "l.0.attn.v_v_proj.weight", "l.0.attn.v_proj"),
        ("l.0.attn.q_proj.u_proj.weight", "l.0.attn.q_proj.v_proj.weight", "l.0.attn.q_proj"),
        ("l.0.attn.v_proj.u_proj.weight", "l.0.attn.v_proj.v_proj.weight", "l.0.attn.v_proj"),
        ("l.0.q_proj.ALinear.weight", "l.0.q_proj.BLinear.weight", "l.0.q_proj"),
        ("l.0.q_proj.linear_u.weight", "l.0.q_proj.linear_v.weight", "l.0.q_proj"),
        ("l.0.q_proj.U", "l.0.q_proj.V", "l.0.q_proj"),
        ("l.0.q_proj.U.weight", "l.0.q_proj.V.weight", "l.0.q_proj"),
        ("l.0.q_proj.A", "l.0.q_proj.B", "l.0.q_proj"),
        ("l.0.q_proj.B", "l.0.q_proj.A", "l.0.q_proj"),
        ("l.0.q_proj_u.weight", "l.0.q_proj_v.weight", "l.0.q_proj"),
        ("l.0.fc1_u_proj.weight", "l.0.fc1_v_proj.weight", "l.0.fc1"),
        ("l.0.q_proj.weight_u", "l.0.q_proj.weight", "l.0.q_proj"),
    ],
)
@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (8, 8)])
def test_pair_names(u: str, v: str, name: str, shape: tuple[int, int]) -> None:
    m, n = shape
    for shapes in ({u: (m, 2), v: (2, n)}, {v: (2, n), u: (m, 2)}):
        pairs, dense = find_pairs(_checkpoint(shapes))
        assert [(p.name, p.u, p.v, p.shape, p.rank) for p in pairs] == [(name, u, v, (m, n), 2)]
        assert (pairs[0].layer, pairs[0].cluster) == (0, name.split(".")[-1])
        assert dense == []


def test_no_pair_where_shapes_or_names_do_not_fit() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "l.0.q_u_proj.weight": (8, 3),  # another rank
        "l.0.q_v_proj.weight": (2, 8),
        "l.0.mlp.u_proj.weight": (8, 8),  # two dense siblings
        "l.0.mlp.v_proj.weight": (8, 8),
        "l.0.k_u_proj.weight": (8, 2),  # no partner
        "l.0.u.bias": (8,),
        "l.0.v.bias": (8,),
        "l.0.position.weight": (9, 8),
        "embed.weight": (30, 8),
    }
    checkpoint = _checkpoint(shapes, **{"l.0.position": "torch.nn.modules.sparse.Embedding"})
    pairs, dense = find_pairs(checkpoint)

    assert pairs == []
    assert [t.name for t in dense] == list(shapes)[:5]


# Files that are damaged, or no checkpoints.


@FORMATS
def test_truncated_file_is_refused(
    tmp_path: Path, component: types.ModuleType, zipped: bool
) -> None:
    path = _saved(tmp_path / "m.pt", component.SVD_Model(), zipped)
    data = path.read_bytes()
    for keep in (0, 1, 3, 40, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        with pytest.raises(
            SourceError, match=r"m\.pt is not a readable torch checkpoint"
        ) as caught:
            read_foreign(path)
        assert caught.value.hint


def test_random_bytes_are_refused(tmp_path: Path) -> None:
    chance = random.Random(0)
    path = tmp_path / "m.pt"
    for start in (b"", b"\x80\x02", b"PK\x03\x04"):
        for _ in range(50):
            path.write_bytes(start + chance.randbytes(300))
            with pytest.raises(SourceError):
                read_foreign(path)


@FORMATS
def test_damaged_bytes_are_read_or_refused(
    tmp_path: Path, component: types.ModuleType, zipped: bool
) -> None:
    path = _saved(tmp_path / "m.pt", component.SVD_Model(layers=1), zipped)
    data = path.read_bytes()
    chance = random.Random(1)
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 5, 50))):
            damaged[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            find_pairs(read_foreign(path))
        except SourceError:
            continue


def test_zip_that_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(SourceError, match=r"0 data\.pkl"):
        read_foreign(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        read_foreign(tmp_path / "none.pt")
    with pytest.raises(SourceError, match="Is a directory"):
        read_foreign(tmp_path)


def test_missing_storage_is_a_problem(tmp_path: Path) -> None:
    path = _saved(tmp_path / "m.pt", {"a": torch.zeros(4), "b": torch.zeros(5)})
    lean = tmp_path / "lean.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(lean, "w") as target:
        for info in source.infolist():
            if not info.filename.endswith("data/1"):
                target.writestr(info.filename, source.read(info))
    assert read_foreign(lean).problems == (
        "1 storages are missing or of the wrong size, such as `1`",
    )


# Attacks. Every payload leaves a file behind where the stock pickle module loads it.


def _text(value: str) -> bytes:
    data = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _call(module: str, name: str, *args: bytes) -> bytes:
    return _global(module, name) + _tuple(*args) + pickle.REDUCE


def _dict(**items: bytes) -> bytes:
    pairs = b"".join(_text(key) + value for key, value in items.items())
    return pickle.EMPTY_DICT + pickle.MARK + pairs + pickle.SETITEMS


def _touch(path: Path) -> bytes:
    return _text(f"touch '{path}'")


def _system(path: Path) -> bytes:
    return _call("os", "system", _touch(path))


def _open(path: Path) -> bytes:
    return _text(f"open({str(path)!r}, 'w').close()")


def _stack_global(module: bytes, name: bytes) -> bytes:
    return pickle.PROTO + b"\x04" + module + name + pickle.STACK_GLOBAL


NAMESPACE = _global("argparse", "Namespace")  # a class whose attributes can be set
INSTANCE = NAMESPACE + pickle.EMPTY_TUPLE + pickle.NEWOBJ


def _getattr_chain(path: Path) -> bytes:
    module = _call("importlib", "import_module", _text("os"))
    system = _call("builtins", "getattr", module, _text("system"))
    return system + _tuple(_touch(path)) + pickle.REDUCE


def _class_attribute(path: Path) -> bytes:
    """Give a class a `__setstate__` by BUILD's slots, then set an instance's state."""
    slots = _tuple(pickle.NONE, _dict(__setstate__=_global("os", "system")))
    return NAMESPACE + slots + pickle.BUILD + INSTANCE + _touch(path) + pickle.BUILD


def _callable_attribute(path: Path) -> bytes:
    """Give an instance an `append` by its `__dict__`, then append to it."""
    state = _dict(append=_global("os", "system"))
    return INSTANCE + state + pickle.BUILD + _touch(path) + pickle.APPEND


def _module_state(path: Path) -> bytes:
    """A module stand-in whose state replaces `__class__` and `__dict__` and calls inside."""
    inside = {"_parameters": _dict(weight=_system(path)), "_modules": _dict(), "__dict__": _dict()}
    return INSTANCE + _dict(__class__=NAMESPACE, **inside) + pickle.BUILD


def _memo_confusion(path: Path) -> bytes:
    """Names that reach STACK_GLOBAL through the memo, behind harmless ones."""
    stored = _text("os") + pickle.BINPUT + b"\x00" + _text("system") + pickle.BINPUT + b"\x01"
    decoy = _text("torch._utils") + pickle.MEMOIZE + _text("_rebuild_tensor_v2") + pickle.MEMOIZE
    taken = [pickle.BINGET + b"\x00", pickle.BINGET + b"\x01"]
    return stored + decoy + _stack_global(*taken) + _tuple(_touch(path)) + pickle.REDUCE


def _keywords(path: Path) -> bytes:
    keywords = _dict(args=_touch(path), shell=pickle.NEWTRUE)
    cls = _stack_global(_text("subprocess"), _text("Popen"))
    return cls + pickle.EMPTY_TUPLE + keywords + pickle.NEWOBJ_EX


def _rebuilt_tensor(path: Path) -> bytes:
    call = _system(path) + pickle.BINPUT + b"\x00"
    size = _tuple(pickle.BINGET + b"\x00")
    return call + _call("torch._utils", "_rebuild_tensor_v2", size, size, size, size)


# name: (payload, what the user must be told about it). Where an instruction makes objects without
# initialising them, and so does no harm alone, a call follows it.
PAYLOADS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "os.system": (_system, "`os.system`"),
    "posix.system": (lambda p: _call("posix", "system", _touch(p)), "`posix.system`"),
    "subprocess": (lambda p: _call("subprocess", "getoutput", _touch(p)), "`subprocess.getoutput`"),
    "eval": (lambda p: _call("builtins", "eval", _open(p)), "`builtins.eval`"),
    "exec by its old name": (lambda p: _call("__builtin__", "exec", _open(p)), "`builtins.exec`"),
    "getattr": (_getattr_chain, "`importlib.import_module`"),
    "nested": (lambda p: _dict(a=_dict(b=_tuple(_tuple(_system(p))))), "`os.system`"),
    "dict key": (
        lambda p: pickle.EMPTY_DICT + _system(p) + pickle.NONE + pickle.SETITEM,
        "`os.system`",
    ),
    "stack global": (
        lambda p: _stack_global(_text("os"), _text("system")) + _tuple(_touch(p)) + pickle.REDUCE,
        "`os.system`",
    ),
    "dotted name": (
        lambda p: (
            _stack_global(_text("tempfile"), _text("_os.system"))
            + _tuple(_touch(p))
            + pickle.REDUCE
        ),
        "`tempfile._os.system`",
    ),
    "memo confusion": (_memo_confusion, "`os.system`"),
    "INST": (
        lambda p: pickle.MARK + _touch(p) + pickle.INST + b"os\nsystem\n",
        "INST at byte",
    ),
    "OBJ": (
        lambda p: pickle.MARK + _global("os", "system") + _touch(p) + pickle.OBJ,
        "OBJ at byte",
    ),
    "NEWOBJ": (
        lambda p: (
            _global("subprocess", "Popen")
            + _tuple(_tuple(_text("touch"), _text(str(p))))
            + pickle.NEWOBJ
            + _system(p)
        ),
        "`subprocess.Popen`",
    ),
    "NEWOBJ_EX": (lambda p: _keywords(p) + _system(p), "`subprocess.Popen`"),
    "class attribute": (_class_attribute, "`os.system`"),
    "callable attribute": (_callable_attribute, "`os.system`"),
    "module state": (_module_state, "`os.system`"),
    "copyreg": (
        lambda p: _call("copyreg", "__newobj__", NAMESPACE) + _system(p),
        "`os.system`",
    ),
    "rebuilt tensor": (_rebuilt_tensor, "`os.system`"),
}


def _zip_file(payload: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3")
    return buffer.getvalue()


def _legacy_file(payload: bytes, position: int) -> bytes:
    values: list[object] = [0x1950A86A20F9469CFC6C, 1001, {}, {}, []]
    parts = [pickle.dumps(value, 2) for value in values]
    parts[position] = payload
    return b"".join(parts)


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "zip": _zip_file,
    "legacy": functools.partial(_legacy_file, position=3),
    "legacy protocol": functools.partial(_legacy_file, position=1),
    "legacy keys": functools.partial(_legacy_file, position=4),
}


def _told(path: Path) -> str:
    """Read the file and return what the user is told about it."""
    try:
        return "\n".join(read_foreign(path).problems)
    except SourceError as error:
        return f"{error.message}\n{error.hint}"


@pytest.mark.parametrize("name", [name for name in PAYLOADS if name != "rebuilt tensor"])
def test_payload_is_real(tmp_path: Path, name: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "payload.pkl"
    path.write_bytes(PAYLOADS[name][0](marker) + pickle.STOP)
    load = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-c", load, str(path)], check=False, capture_output=True)
    assert marker.exists()


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", PAYLOADS)
def test_payload_does_nothing(tmp_path: Path, name: str, container: str) -> None:
    payload, told = PAYLOADS[name]
    marker, path = tmp_path / "marker", tmp_path / "m.pt"
    path.write_bytes(CONTAINERS[container](payload(marker) + pickle.STOP))
    codecs.lookup("cp437")  # zipfile itself loads it, with the first entry's name
    imported = set(sys.modules)

    assert told in _told(path)
    assert not marker.exists()
    assert set(sys.modules) == imported


class _Trap:
    """A class that is importable here and leaves a file behind whatever is done with it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str], object]:
        return _spring, (str(self.path),), {"state": 1}


def _spring(path: str) -> None:
    Path(path).touch()


@FORMATS
def test_importable_classes_are_not_called(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "marker"
    value = {"model": {"w": torch.zeros(2)}, "trap": _Trap(marker)}
    path = _saved(tmp_path / "m.pt", value, zipped)
    checkpoint = read_foreign(path)

    assert f"{__name__}._spring" in checkpoint.globals_seen
    assert list(checkpoint.tensors) == ["w"]
    assert not marker.exists()
    with pytest.raises(AttributeError):  # the state that belongs to None, set after the call
        torch.load(path, weights_only=False)
    assert marker.exists()


def test_dangerous_global_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(_zip_file(_call("posix", "system", _text("true")) + pickle.STOP))
    told = "uses `posix.system`, which executes code when loaded by other tools; "
    assert read_foreign(path).problems == (told + "it was not executed here",)


def test_two_ways_to_write_one_name_are_both_seen(tmp_path: Path) -> None:
    harmless = _stack_global(_text("package.os"), _text("system"))
    path = tmp_path / "m.pt"
    path.write_bytes(
        _zip_file(harmless + _stack_global(_text("package"), _text("os.system")) + b".")
    )
    assert "uses `package.os.system`" in _told(path)


def test_attribute_of_a_class_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(_zip_file(NAMESPACE + _dict(a=pickle.NONE) + pickle.BUILD + pickle.STOP))
    assert "sets attributes of `argparse.Namespace` itself" in _told(path)


def test_names_are_safe_to_print(tmp_path: Path) -> None:
    payload = _stack_global(_text("os\x1b[2J"), _text("x" * 5000)) + pickle.STOP
    path = tmp_path / "m.pt"
    path.write_bytes(_zip_file(payload))
    (name,) = read_foreign(path).globals_seen
    assert name.isprintable()
    assert len(name) < 400
    state = {"a\nb\x1b": torch.zeros(1)}
    assert list(read_foreign(_saved(path, state)).tensors) == [r"a\nb\x1b"]


# Bounds.


def _refusal(path: Path, payload: bytes) -> str:
    path.write_bytes(_zip_file(payload))
    with pytest.raises(SourceError) as caught:
        read_foreign(path)
    return caught.value.message


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        (b"\x82\x01.", "EXT1"),
        (b"\x83\x01\x00.", "EXT2"),
        (b"\x84\x01\x00\x00\x00.", "EXT4"),
        (b"Pabc\n.", "PERSID"),
        (b"\x97.", "NEXT_BUFFER"),
        (b".", "empty stack"),
        (b"t.", "never pushed"),
        (b"h\x05.", "never stored"),
        (b"K\x01K\x02a.", "adds items to a int"),
        (b"}(K\x01u.", "without a value"),
        (b"K\x01K\x02Q.", "external data"),
        (b"K\x01Nb.", "sets the state of a int"),
        (b"K\x01K\x02\x93.", "names a global by a int"),
        (_global("os", "system") + b"NR.", "arguments of a call are a NoneType"),
        (_call("torch._utils", "_rebuild_tensor_v2") + b".", "not one that torch writes"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "does not end within"),
    ],
)
def test_malformed_pickles_are_refused(tmp_path: Path, payload: bytes, told: str) -> None:
    assert told in _refusal(tmp_path / "m.pt", payload)


def _plain(value: object) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def _tensor(kind: str, count: int, size: tuple[object, ...]) -> bytes:
    persistent = [_text("storage"), _global("torch", kind), _text("0"), _text("cpu"), _plain(count)]
    storage = _tuple(*persistent) + pickle.BINPERSID
    sizes = _tuple(*map(_plain, size))
    return _call("torch._utils", "_rebuild_tensor_v2", storage, _plain(0), sizes, sizes)


@pytest.mark.parametrize(
    ("kind", "count", "size", "told"),
    [
        ("Popen", 1, (1,), "not a known type of tensor storage"),
        ("FloatStorage", -1, (1,), "invalid number"),
        ("FloatStorage", 1 << 70, (1,), "invalid number"),
        ("FloatStorage", 1, (-1,), "values that are not counts"),
        ("FloatStorage", 1, ("a",), "values that are not counts"),
        ("FloatStorage", 1, (1,) * 65, "not a short tuple"),
    ],
)
def test_impossible_tensors_are_refused(
    tmp_path: Path, kind: str, count: int, size: tuple[object, ...], told: str
) -> None:
    assert told in _refusal(tmp_path / "m.pt", _tensor(kind, count, size) + b".")


def test_tensor_beyond_its_data_and_data_without_tensor(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(_zip_file(_dict(a=_tensor("HalfStorage", 4, (3, 3))) + b"."))
    assert "1 tensors exceed their storage, such as `a`" in _told(path)
    unknown = _tensor("HalfStorage", 4, (4,)).replace(b"_rebuild_tensor_v2", b"_rebuild_other")
    path.write_bytes(_zip_file(_dict(a=unknown) + b"."))
    assert "1 storages (8 bytes) are not used by any known tensor" in _told(path)


def test_size_of_the_pickle_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_reader, "MAX_PICKLE_BYTES", 1000)
    assert "does not end within" in _refusal(tmp_path / "m.pt", _text("a" * 2000) + b".")
    monkeypatch.setattr(unpickle, "MAX_OPERATIONS", 100)
    assert "instructions" in _refusal(tmp_path / "m.pt", b"N" * 200 + b".")


def test_deep_nesting_is_survived(tmp_path: Path) -> None:
    depth = 100_000
    path = tmp_path / "m.pt"
    for payload in (b"]" * depth + b"a" * (depth - 1), b"N" + b"\x85" * depth, b"(" * depth + b"t"):
        path.write_bytes(_zip_file(payload + b"."))
        assert "" in _told(path)


def test_shared_values_do_not_multiply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = [pickle.BINGET + bytes([i]) for i in range(60)]
    tuples = b"".join(_tuple(get, get) + b"q" + bytes([i + 1]) for i, get in enumerate(pair))
    path = tmp_path / "m.pt"
    path.write_bytes(_zip_file(b"]q\x00" + tuples + b"."))
    assert read_foreign(path).tensors == {}

    # As a dict's key, whose hash would take 2**60 steps.
    last = pickle.BINGET + bytes([60])
    keyed = b"]q\x00" + tuples + pickle.EMPTY_DICT + last + pickle.NONE + pickle.SETITEM
    path.write_bytes(_zip_file(keyed + b"."))
    assert read_foreign(path).tensors == {}

    monkeypatch.setattr(tensor_names, "_MAX_VISITS", 10_000)
    modules = b"".join(_module(i) for i in range(60))
    assert "more than 10,000 objects" in _refusal(path, _dict() + b"q\x00" + modules + b".")


def _module(index: int) -> bytes:
    below = pickle.BINGET + bytes([index])
    modules = _dict(a=below, b=below)
    built = INSTANCE + _dict(_parameters=_dict(), _modules=modules) + pickle.BUILD
    return built + pickle.BINPUT + bytes([index + 1])


def test_module_inside_itself_ends(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    itself = _dict(a=pickle.BINGET + b"\x00")
    state = _dict(_parameters=_dict(), _modules=itself)
    path.write_bytes(_zip_file(INSTANCE + b"q\x00" + state + b"b."))
    assert "nested more than" in _told(path)


def test_library_imports_no_torch() -> None:
    check = "import sys, hisvd_cli.modeling.pickles.foreign; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
