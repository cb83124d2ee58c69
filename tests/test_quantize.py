"""Checkpoints of integers: what they take, how they load, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hisvd_cli.compression.quantization import sublayers_of
from hisvd_cli.inspection.stored_sublayers import Layout, sublayer_shapes
from hisvd_cli.modeling.checkpoints.checkpoint import open_checkpoint
from hisvd_cli.modeling.layers.quantized import (
    QuantizedLinear,
    QuantizedLowRankLinear,
    quantized_bytes,
)
from hisvd_cli.modeling.structure.sublayers import Sublayer
from hisvd_cli.pipelines.compressing.quantization import quantize_checkpoint
from hisvd_cli.pipelines.config.resolution import resolve
from hisvd_cli.utils.errors import OutputError
from hisvd_cli.utils.files.tensorfile import write_tensors
from hisvd_cli.utils.progress import Silent
from tests.cli_helpers import as_json, fail, hisvd, succeed, text_file
from tests.conftest import CACHE, MakeModel
from tests.models import random_text
from tests.test_plugin import python
from tests.workbench import tree

IDS = torch.arange(24).view(2, 12)
MakeCheckpoint = Callable[..., Path]
GPTQ = ("--quantize-method", "gptq")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: MakeModel) -> MakeCheckpoint:
    """Return checkpoints of tiny models by architecture and storage; do not edit them."""
    root = tmp_path_factory.mktemp("quantize")
    (root / "text.txt").write_text(random_text(4000))

    @cache
    def make(arch: str, storage: str) -> Path:
        output = root / f"{arch}-{storage}"
        text = ("--dataset", root / "text.txt", "--samples", 8, "--seqlen", 64)
        model = ("--model", tiny_model(arch), "--ratio", 0.7, "--storage", storage)
        path = ("--calibration", root / f"{arch}-calibration", "--output", output)
        succeed("compress", *model, *text, *path)
        return output

    return lambda arch, storage="pair": make(arch, storage)


def logits(path: Path, **kwargs: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return how far apart two logits are, as a share of their size."""
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(
    ("arch", "storage", "bits"),
    [
        ("llama", "pair", "int4"),
        ("llama", "pivoted", "int8"),
        ("opt", "pair", "int8"),
        ("opt", "pivoted", "int4"),
        ("qwen2", "pair", "int4"),
    ],
)
def test_integers_load_in_plain_transformers(
    arch: str, storage: str, bits: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    whole = checkpoint(arch, storage)
    made = tmp_path / "made"
    group = ("--group-size", 16) if bits == "int4" else ()
    succeed("convert", whole, "--quantize", bits, *GPTQ, *group, "--output", made)
    found = logits(made)
    assert apart(found, logits(whole)) < {"int8": 0.02, "int4": 0.2}[bits]
    succeed("inspect", made)
    succeed("convert", made, "--to", "dense", "--output", tmp_path / "dense")
    torch.testing.assert_close(found, logits(tmp_path / "dense"), rtol=1e-3, atol=1e-3)


def test_bytes_on_disk_are_those_that_were_counted(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    whole, made = checkpoint("llama"), tmp_path / "made"
    succeed("convert", whole, "--quantize", "int4", "--group-size", 24, "--output", made)
    found = open_checkpoint(made)
    names = [s.name for s in sublayers_of(found)]
    shapes = _matrices(made)
    sizes = {name: quantized_bytes(shape, 4, 24) for name, shape in shapes.items()}
    inside = [n for n in found.weights if n.rpartition(".")[0] in names]
    assert sum(found.weights.infos[name].nbytes for name in inside) == sum(sizes.values())
    document = as_json("inspect", made)
    assert document["bytes"] == (made / "model.safetensors").stat().st_size
    assert {(row["dtype"], row["bits"]) for row in document["sublayers"]} == {("uint8", 4)}
    assert document["bytes_ratio"] < document["model_ratio"]
    before = as_json("inspect", whole)
    assert document["parameters"] == before["parameters"]
    assert document["dense_bytes"] == before["dense_bytes"] == 4 * before["dense_parameters"]
    assert as_json("convert", whole, "--quantize", "int4", "--group-size", 24, "--output", made,
                   "--overwrite")["bytes"] == document["bytes"]  # fmt: skip
    assert "int4 in 21 layers, groups of 24" in (made / "README.md").read_text()


def _matrices(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the shapes of the matrices of a checkpoint's sublayers, from its plan."""
    plan = json.loads((folder / "plan.json").read_text())["sublayers"]
    low = [s for s in plan if not s["dense"]]
    sublayers = [Sublayer(s["name"], s["layer"], s["cluster"], tuple(s["shape"])) for s in plan]
    found = sublayer_shapes(sublayers, Layout({s["name"]: s["rank"] for s in low}))
    return {name: (shape[0], shape[1]) for name, shape in found.items()}


@pytest.mark.parametrize(("dense", "bits"), [("int8", 8), ("same", 4)])
def test_what_stays_dense_has_bits_of_its_own(
    dense: str, bits: int, tiny_model: MakeModel, tmp_path: Path
) -> None:
    whole, made = tmp_path / "whole", tmp_path / "made"
    text = ("--dataset", text_file(tmp_path), "--samples", 4, "--seqlen", 32)
    scope = ("--ratio", 0.7, "--exclude", "*v_proj")
    succeed("compress", "--model", tiny_model("llama"), *text, *scope, "--output", whole)
    kinds = ("--quantize", "int4", "--quantize-dense", dense, "--group-size", 16)
    succeed("convert", whole, *kinds, "--output", made)
    rows = as_json("inspect", made)["sublayers"]
    assert {row["bits"] for row in rows if row["dense"]} == {bits}
    assert {row["bits"] for row in rows if not row["dense"]} == {4}
    assert apart(logits(whole), logits(made)) < 0.3


@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_bits_may_differ_from_sublayer_to_sublayer(
    method: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    whole = open_checkpoint(checkpoint("llama", "pivoted"))
    names = [s.name for s in sublayers_of(whole)]
    bits = {name: (16, 8, 4)[i % 3] for i, name in enumerate(names)}
    flags = {("quantize", "bits"): "int8", ("quantize", "method"): method}
    resolved = resolve(flags, environ={}, start=tmp_path)
    quantize_checkpoint(resolved, whole, tmp_path / "made", None, Silent(), bits)
    made = open_checkpoint(tmp_path / "made")
    assert made.bits == {name: n for name, n in bits.items() if n != 16}
    assert made.storage == "pivoted"
    assert apart(logits(made.folder), logits(whole.folder)) < 0.3
    succeed("inspect", made.folder)
    rows = as_json("inspect", made.folder)["sublayers"]
    assert {row["name"]: row["bits"] for row in rows} == {**bits} | {
        name: 32 for name, n in bits.items() if n == 16
    }
    assert {row["storage"] for row in rows if row["bits"] == 4} == {"pair"}


def test_a_single_file_holds_integers_too(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    single, back = tmp_path / "made.pt", tmp_path / "back"
    succeed("convert", checkpoint("opt"), "--quantize", "int8", "--to", "pt", "--output", single)
    succeed("inspect", single)
    succeed("convert", single, "--to", "hf", "--output", back)
    succeed("convert", checkpoint("opt"), "--quantize", "int8", "--output", tmp_path / "made")
    assert torch.equal(logits(back), logits(tmp_path / "made"))
    left = {path.name for path in tmp_path.iterdir()} - {CACHE}
    assert left == {"made.pt", "back", "made"}


def test_what_is_loaded_is_saved_and_cast_exactly(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    succeed("convert", checkpoint("llama"), "--quantize", "int4", "--output", made)
    stored = load_file(made / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model: Any = AutoModelForCausalLM.from_pretrained(made, dtype=dtype)
        model.to(torch.bfloat16).save_pretrained(tmp_path / "again")
        again = load_file(tmp_path / "again" / "model.safetensors")
        assert set(again) == set(stored)
        integers = [name for name, tensor in stored.items() if not tensor.is_floating_point()]
        assert all(torch.equal(again[name], stored[name]) for name in integers)
    assert not model.hf_quantizer.is_trainable
    layers = [
        m for m in model.modules() if isinstance(m, (QuantizedLinear, QuantizedLowRankLinear))
    ]
    assert layers
    assert not any(p.requires_grad for m in layers for p in m.parameters())
    places = {
        "model.embed_tokens": "cpu",
        "model.layers": "disk",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    places |= {"model.rotary_emb": "cpu"}
    offloaded = logits(made, device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(offloaded, logits(made))
    dense = AutoModelForCausalLM.from_pretrained(made).dequantize()
    with torch.no_grad():
        torch.testing.assert_close(dense(IDS).logits, logits(made), rtol=1e-3, atol=1e-3)


REMOTE = """
import sys, torch
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError as error:
    print("refused")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.arange(24).view(2, 12)).logits, sys.argv[2])
assert "hisvd_cli" not in sys.modules
"""


@pytest.mark.slow
def test_without_hisvd_the_folder_brings_its_code(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    succeed("convert", checkpoint("qwen2", "pivoted"), "--quantize", "int8", "--output", made)
    out = python(REMOTE, made, tmp_path / "logits.pt", cache=tmp_path, isolated=True)
    assert "refused" in out
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(made))


Q0 = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("damage", ["missing", "misshapen", "infinite", "bits", "extra", "version"])
def test_a_damaged_checkpoint_is_refused(
    damage: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    succeed("convert", checkpoint("llama"), "--quantize", "int8", "--output", made)
    tensors = load_file(made / "model.safetensors")
    config = json.loads((made / "config.json").read_text())
    scale = f"{Q0}.weight_scale"
    if damage == "missing":
        del tensors[scale]
    elif damage == "misshapen":
        tensors[scale] = tensors[scale][1:]
    elif damage == "infinite":
        tensors[scale] = torch.full_like(tensors[scale], 0x7C00)
    elif damage == "bits":
        config["quantization_config"]["bits"][Q0] = 4
    elif damage == "extra":
        del config["quantization_config"]["bits"][Q0]
    else:
        config["quantization_config"]["format_version"] = 1
    save_file({n: t.contiguous() for n, t in tensors.items()}, made / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises((RuntimeError, ValueError), match=r"scale|shape|version|low-rank"):
        AutoModelForCausalLM.from_pretrained(made)
    assert "problem" in succeed_or_not("inspect", made)


def succeed_or_not(*words: object) -> str:
    """Return what a command that finds a problem says."""
    result = hisvd(*words)
    assert result.exit_code == 1, result.output
    return result.output.replace("Error", "problem")


def test_compress_makes_what_convert_makes(
    checkpoint: MakeCheckpoint, tiny_model: MakeModel, tmp_path: Path
) -> None:
    whole = checkpoint("llama")
    text = ("--dataset", whole.parent / "text.txt", "--samples", 8, "--seqlen", 64)
    model = ("--model", tiny_model("llama"), "--ratio", 0.7)
    kinds = ("--quantize", "int4", *GPTQ)
    here = ("--calibration", tmp_path / "calibration", "--output", tmp_path / "one")
    document = as_json("compress", *model, *text, *here, *kinds)
    succeed("convert", whole, *kinds, "--output", tmp_path / "two")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    assert document["bytes"] == len(weights[0])
    assert {path.name for path in tmp_path.iterdir()} >= {"one", "two", "calibration"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".one")]


def test_the_hidden_states_are_those_of_integers(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on after a block makes what an uninterrupted one makes."""
    whole = shutil.copytree(checkpoint("llama", "pivoted"), tmp_path / "whole")
    kinds = ("--quantize", "int4", *GPTQ, "--max-shard-size", 0.00002)
    succeed("convert", whole, *kinds, "--output", tmp_path / "one")
    count = 0

    def stop_after_two(*args: Any) -> None:
        nonlocal count
        count += 1
        if count > 2:
            raise KeyboardInterrupt
        write_tensors(*args)

    with monkeypatch.context() as patch:
        patch.setattr("hisvd_cli.compression.quantized_parts.write_tensors", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            _quantize(whole, tmp_path / "two")
    assert not (tmp_path / "two").exists()
    assert len(list((tmp_path / ".two.partial").glob("*.part"))) == 2
    _quantize(whole, tmp_path / "two")
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    assert [n for n in one if n.endswith(".safetensors")] == [
        n for n in two if n.endswith(".safetensors")
    ]
    assert all(one[n] == two[n] for n in one if n.endswith(".safetensors"))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".two")]


def trained_and_rounded(model: Path, folder: Path) -> tuple[object, ...]:
    """Return a compression that trains and quantizes a tiny model."""
    text = ("--dataset", text_file(folder), "--samples", 4, "--seqlen", 32, "--ratio", 0.5)
    training = ("--recover", "distill", "--recover-tokens", 300, "--recover-seqlen", 16)
    return ("compress", "--model", model, *text, *training, "--quantize", "int8")


def stop(*_args: Any, **_kwargs: Any) -> None:
    raise OutputError("The disk is full.", "Free some space.")


def test_an_interrupted_rounding_loses_no_training(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = trained_and_rounded(tiny_model("llama"), tmp_path)
    succeed(*words, "--output", tmp_path / "one")

    with monkeypatch.context() as patch:
        patch.setattr("hisvd_cli.pipelines.compressing.writing.quantize_compressed", stop)
        assert fail(*words, "--output", tmp_path / "two")[0] == "The disk is full."
    assert not (tmp_path / "two").exists()
    assert [path.name for path in tmp_path.iterdir() if "two" in path.name] == [".two.hisvd.work"]
    with monkeypatch.context() as patch:
        patch.setattr("hisvd_cli.pipelines.compressing.writing.fine_tune", stop)
        patch.setattr("hisvd_cli.pipelines.compressing.writing.factored", stop)
        succeed(*words, "--output", tmp_path / "two")
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".two")]


def test_an_interrupted_single_file_loses_no_step(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = trained_and_rounded(tiny_model("llama"), tmp_path)
    succeed(*words, "--output", tmp_path / "one.pt")

    writing = "hisvd_cli.pipelines.compressing.writing"
    with monkeypatch.context() as patch:
        patch.setattr(f"{writing}.write_single_file", stop)
        assert fail(*words, "--output", tmp_path / "two.pt")[0] == "The disk is full."
    with monkeypatch.context() as patch:
        for step in ("factored", "fine_tune", "quantize_compressed"):
            patch.setattr(f"{writing}.{step}", stop)
        message, _ = fail(*words, "--recover-seed", 1, "--output", tmp_path / "two.pt")
        assert message == "The disk is full."  # trained in another way
        succeed(*words, "--output", tmp_path / "two.pt")
    assert (tmp_path / "two.pt").read_bytes() == (tmp_path / "one.pt").read_bytes()
    left = sorted(path.name for path in tmp_path.iterdir() if "two" in path.name)
    assert left == ["two.plan.json", "two.pt"]


def _quantize(whole: Path, output: Path) -> None:
    flags = {
        ("quantize", "bits"): "int4",
        ("quantize", "method"): "gptq",
        ("compress", "max_shard_size"): 0.00002,
    }
    resolved = resolve(flags, environ={}, start=whole)
    quantize_checkpoint(resolved, open_checkpoint(whole), output, None, Silent())


def test_bad_requests_say_what_to_do(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    whole, made = checkpoint("llama"), tmp_path / "made"
    to = ("--output", tmp_path / "other")
    message, _ = fail("convert", whole, "--quantize", "int8", "--to", "dense", *to, code=2)
    assert "--to dense" in message
    message, _ = fail("convert", whole, "--quantize", "int4", "--group-size", 0, *to, code=2)
    assert "--group-size 0" in message
    message, hint = fail("convert", whole, "--to", "hf", *GPTQ, *to, code=2)
    assert "--quantize-method" in message
    assert "--quantize" in hint
    message, _ = fail("convert", whole, "--quantize", "int4", *GPTQ, "--dataset", "no.txt", *to)
    assert "no.txt" in message
    succeed("convert", whole, "--quantize", "int8", "--output", made)
    message, _ = fail("convert", made, "--quantize", "int4", *to)
    assert "already quantized" in message
    assert not (tmp_path / "other").exists()


def test_a_factor_that_is_no_number_stops_the_work(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    whole = shutil.copytree(checkpoint("llama"), tmp_path / "whole")
    tensors = load_file(whole / "model.safetensors")
    tensors[f"{Q0}.weight_u"][0, 0] = torch.nan
    save_file(tensors, whole / "model.safetensors", {"format": "pt"})
    message, _ = fail("convert", whole, "--quantize", "int8", "--output", tmp_path / "made")
    assert Q0 in message
    assert not (tmp_path / "made").exists()
