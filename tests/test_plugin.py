"""Low-rank folders in plain transformers, against a dense model of explicitly multiplied factors.

No test here downloads anything: the models are tiny and random.
"""

from __future__ import annotations

import copy
import functools
import gc
import io
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

import hisvd_cli
from hisvd_cli.linalg.pivoting import pivoted
from hisvd_cli.modeling.layers.lowrank import FACTORS, LAYERS, LowRankLinear
from hisvd_cli.modeling.layers.transformers_plugin import (
    AUTO_MAP,
    FORMAT_VERSIONS,
    MODELING_FILE,
    HiSVDConfig,
    HiSVDQuantizer,
    low_rank_layers,
    register,
    remote_code_files,
)

RANK = 6
REPOSITORY = Path(hisvd_cli.__file__).parents[1]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**GROUPED, "tie_word_embeddings": False, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", {**GROUPED, "tie_word_embeddings": True}),
    "opt": ("OPTConfig", {"ffn_dim": 40, "word_embed_proj_dim": 24}),
    "gemma2": ("Gemma2Config", GROUPED),
    "phi": ("PhiConfig", {"num_attention_heads": 3, "tie_word_embeddings": False}),
}

Model = Any  # transformers' own model classes say little to a type checker
MakeFolder = Callable[..., "Folder"]  # architecture, storage


@dataclass
class Folder:
    """A checkpoint folder, and the dense model that it must equal."""

    path: Path
    dense: Model
    ranks: dict[str, int]

    def expected(self) -> Tensor:
        """Return the dense model's logits, ``[2, 8, vocabulary]``."""
        return logits(self.dense)


def logits(model: Model) -> Tensor:
    """Return a model's logits for ``IDS``, ``[2, 8, vocabulary]``."""
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def load(path: Path, **kwargs: Any) -> Model:
    """Load a folder as any user does."""
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def dense_model(architecture: str) -> Model:
    """Build a tiny model with random numbers in every tensor, biases and norms too."""
    class_name, extra = CONFIGS[architecture]
    config = getattr(transformers, class_name)(**{**SIZES, **extra})
    torch.manual_seed(0)
    model: Model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def factor(model: Model, storage: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Factor every linear of the blocks by plain SVD; the model gets the multiplied factors.

    Returns:
        The tensors of the low-rank checkpoint, and the ranks by name.
    """
    factors: dict[str, Tensor] = {}
    ranks = {}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and ".layers." in name:
            U, sigma, Vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
            u, v = U[:, :RANK] * sigma[:RANK], Vh[:RANK]  # [m, r], [r, n]
            linear.weight.data = u @ v
            stored = (v, u) if storage == "pair" else pivoted(u, v)
            leaves = zip(FACTORS[storage], stored, strict=True)
            factors |= {f"{name}.{leaf}": tensor.contiguous() for leaf, tensor in leaves}
            ranks[name] = RANK
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()} | factors
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors, ranks


def write_config(path: Path, model: Model, ranks: dict[str, int], storage: str) -> None:
    """Write ``config.json`` as hisvd does, with the code that travels along."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(path)
    edit_config(
        path,
        auto_map=AUTO_MAP,
        quantization_config=HiSVDConfig(ranks, FORMAT_VERSIONS[storage], storage).to_dict(),
    )
    for name, source in remote_code_files().items():
        shutil.copyfile(source, path / name)


def edit_config(path: Path, **changes: Any) -> None:
    """Change top-level entries of ``config.json``."""
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_ranks(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the ranks in ``config.json`` in place."""
    quantization = json.loads((path / "config.json").read_text())["quantization_config"]
    edit(quantization["ranks"])
    edit_config(path, quantization_config=quantization)


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder in place."""
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """Give the folder of an architecture; made once, not to be changed."""

    @functools.cache
    def make(architecture: str, storage: str = "pair") -> Folder:
        path = tmp_path_factory.mktemp(architecture)
        model = dense_model(architecture)
        tensors, ranks = factor(model, storage)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        write_config(path, model, ranks, storage)
        return Folder(path, model, ranks)

    return make


@pytest.fixture(params=LAYERS)
def qwen2(pristine: MakeFolder, tmp_path: Path, request: pytest.FixtureRequest) -> Folder:
    """A folder of one's own, with biases on some low-rank layers and none on others."""
    folder = pristine("qwen2", request.param)
    path = Path(shutil.copytree(folder.path, tmp_path / "folder"))
    return Folder(path, folder.dense, folder.ranks)


@pytest.mark.parametrize("storage", LAYERS)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_logits_equal_the_dense_model(
    architecture: str, storage: str, pristine: MakeFolder
) -> None:
    folder = pristine(architecture, storage)
    model = load(folder.path)
    assert type(model) is type(folder.dense)
    assert set(low_rank_layers(model)) == set(folder.ranks)
    assert len(folder.ranks) >= 12
    torch.testing.assert_close(logits(model), folder.expected(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage", LAYERS)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_generation_equals_the_dense_model(
    architecture: str, storage: str, pristine: MakeFolder
) -> None:
    folder = pristine(architecture, storage)
    arguments = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    generated = load(folder.path).generate(IDS, **arguments)
    assert generated.shape == (2, 16)
    assert torch.equal(generated, folder.dense.generate(IDS, **arguments))


@pytest.mark.parametrize("storage", LAYERS)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_saving_again_is_bit_exact(
    architecture: str, storage: str, pristine: MakeFolder, tmp_path: Path
) -> None:
    folder = pristine(architecture, storage)
    load(folder.path).save_pretrained(tmp_path)
    before, after = (load_file(p / "model.safetensors") for p in (folder.path, tmp_path))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for key in ("quantization_config", "auto_map", "architectures"):
        old, new = (json.loads((p / "config.json").read_text()) for p in (folder.path, tmp_path))
        assert old[key] == new[key]
    assert torch.equal(logits(load(tmp_path)), logits(load(folder.path)))


@pytest.mark.parametrize("storage", LAYERS)
def test_a_model_compiles_into_one_graph(storage: str, pristine: MakeFolder) -> None:
    model = load(pristine("llama", storage).path)
    expected = logits(model)
    # The eager backend traces as any other does and needs no compiler on the machine.
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_dequantize_gives_a_plain_dense_model(
    architecture: str, pristine: MakeFolder, tmp_path: Path
) -> None:
    folder = pristine(architecture)
    model = load(folder.path)
    model.dequantize()
    assert not low_rank_layers(model)
    torch.testing.assert_close(logits(model), folder.expected(), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert "auto_map" not in config
    assert not list(tmp_path.glob("*.py"))
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt"])
def test_a_model_without_head_takes_the_same_folder(
    architecture: str, pristine: MakeFolder, tmp_path: Path
) -> None:
    folder = pristine(architecture)
    model = AutoModel.from_pretrained(folder.path)
    assert len(low_rank_layers(model)) == len(folder.ranks)
    base = getattr(folder.dense, folder.dense.base_model_prefix)
    with torch.no_grad():
        found, expected = (m(IDS).last_hidden_state for m in (model, base))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(IDS).last_hidden_state, found)


def test_sharded_files(pristine: MakeFolder, tmp_path: Path) -> None:
    folder = pristine("llama")
    model = load(folder.path)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(architecture: str, device_map: str, pristine: MakeFolder) -> None:
    folder = pristine(architecture)
    model = load(folder.path, device_map=device_map)
    torch.testing.assert_close(
        model(IDS.to(model.device)).logits.cpu(), folder.expected(), rtol=1e-3, atol=1e-3
    )


def to_disk(model_path: Path) -> dict[str, str]:
    """Return a device map that leaves one of a tiny model's blocks on disk."""
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    assert (model_path / "config.json").is_file()
    return {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}


def test_layers_on_disk(qwen2: Folder, tmp_path: Path) -> None:
    arguments = {"device_map": to_disk(qwen2.path), "offload_folder": tmp_path / "offload"}
    model = load(qwen2.path, **arguments)
    torch.testing.assert_close(logits(model), qwen2.expected(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"offloaded: model\.layers\.1\."):
        model.dequantize()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, pristine: MakeFolder, tmp_path: Path) -> None:
    folder = pristine("llama")
    model = load(folder.path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    exact = folder.expected()
    error = (logits(model).float() - exact).norm() / exact.norm()
    assert error < 0.05
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype="auto")
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert torch.equal(logits(again), logits(model))
    model.dequantize()
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.skipif(transformers.__version__ < "5", reason="4.57 takes no dtype here")
def test_dequantize_to_a_dtype_casts_the_whole_model(pristine: MakeFolder) -> None:
    model = load(pristine("llama").path, dtype=torch.bfloat16)
    model.dequantize(dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert logits(model).dtype == torch.float32


def test_to_dtype_casts_a_loaded_model(pristine: MakeFolder) -> None:
    model = load(pristine("llama").path).to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert logits(model).dtype == torch.float64


def test_a_head_of_another_class_may_be_new(pristine: MakeFolder) -> None:
    folder = pristine("llama")
    model = AutoModelForSequenceClassification.from_pretrained(folder.path, num_labels=3)
    assert len(low_rank_layers(model)) == len(folder.ranks)


def test_training_changes_the_factors(pristine: MakeFolder) -> None:
    model = load(pristine("llama").path).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_qat_trainable
    assert model.hf_quantizer.is_compileable


def test_copies_and_pickles_save_themselves(pristine: MakeFolder, tmp_path: Path) -> None:
    model = load(pristine("llama").path)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.model.norm.weight.zero_()
    clone.save_pretrained(tmp_path)
    assert (tmp_path / MODELING_FILE).is_file()
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].abs().sum() == 0
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "pickled")
    assert (tmp_path / "pickled" / MODELING_FILE).is_file()


def test_a_loaded_model_can_be_freed(pristine: MakeFolder) -> None:
    model = load(pristine("llama").path)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# --- wrong checkpoints ---------------------------------------------------------------------------

Q0 = "model.layers.0.self_attn.q_proj"
UP1 = "model.layers.1.mlp.up_proj"
VARIANTS: list[dict[str, Any]] = [
    {},
    {"ignore_mismatched_sizes": True},
    {"device_map": "cpu"},
    {"device_map": "auto", "ignore_mismatched_sizes": True},
    {"low_cpu_mem_usage": True, "output_loading_info": True},
    {"low_cpu_mem_usage": False, "trust_remote_code": True},
    {"dtype": torch.bfloat16, "ignore_mismatched_sizes": True},
]
DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no U": (lambda t: t.pop(f"{Q0}.weight_u"), r"lacks .*q_proj\.weight_u"),
    "no V": (lambda t: t.pop(f"{UP1}.weight"), r"lacks .*up_proj\.weight"),
    "no bias": (lambda t: t.pop(f"{Q0}.bias"), r"lacks .*q_proj\.bias"),
    "no norm": (lambda t: t.pop("model.norm.weight"), r"lacks .*model\.norm\.weight"),
    "no layer": (
        lambda t: [t.pop(f"{Q0}.{leaf}") for leaf in ("weight", "weight_u", "bias")],
        r"lacks .*q_proj\.bias",
    ),
    "U too wide": (lambda t: t.update({f"{Q0}.weight_u": torch.zeros(24, 7)}), r"weight_u"),
    "U too short": (lambda t: t.update({f"{Q0}.weight_u": torch.zeros(23, 6)}), r"weight_u"),
    "U too small": (lambda t: t.update({f"{Q0}.weight_u": torch.zeros(72, 1)}), r"weight_u"),
    "V too tall": (lambda t: t.update({f"{UP1}.weight": torch.zeros(7, 24)}), r"weight"),
    "V dense": (lambda t: t.update({f"{UP1}.weight": torch.zeros(40, 24)}), r"weight"),
    "bias too long": (lambda t: t.update({f"{Q0}.bias": torch.zeros(25)}), r"bias"),
    "bias too many": (lambda t: t.update({f"{UP1}.bias": torch.zeros(40)}), r"json: .*up_proj\.b"),
    "U of no layer": (lambda t: t.update({"lm_head.weight_u": torch.zeros(40, 6)}), r"lm_head\.w"),
}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: ",".join(v) or "plain")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wrong_tensor_is_an_error(damage: str, variant: dict[str, Any], qwen2: Folder) -> None:
    edit, message = DAMAGES[damage]
    edit_tensors(qwen2.path, edit)
    with pytest.raises(RuntimeError, match=message):
        load(qwen2.path, **variant)


@pytest.mark.parametrize("damage", ["no U", "U too wide", "no bias", "bias too many", "no norm"])
def test_a_wrong_tensor_is_an_error_without_head(damage: str, qwen2: Folder) -> None:
    edit, _ = DAMAGES[damage]
    edit_tensors(qwen2.path, edit)
    with pytest.raises(RuntimeError, match=r"q_proj|up_proj|norm"):
        AutoModel.from_pretrained(qwen2.path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("leaf", ["weight_u", "weight", "bias"])
def test_a_missing_tensor_of_a_layer_on_disk_is_an_error(
    leaf: str, qwen2: Folder, tmp_path: Path
) -> None:
    edit_tensors(qwen2.path, lambda t: t.pop(f"model.layers.1.self_attn.q_proj.{leaf}"))
    arguments = {"device_map": to_disk(qwen2.path), "offload_folder": tmp_path / "offload"}
    with pytest.raises(RuntimeError, match=rf"lacks .*q_proj\.{leaf}"):
        load(qwen2.path, **arguments)


def test_a_missing_shard_entry_is_an_error(pristine: MakeFolder, tmp_path: Path) -> None:
    load(pristine("llama").path).save_pretrained(tmp_path, max_shard_size="8KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = tmp_path / index["weight_map"].pop(f"{Q0}.weight_u")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = load_file(shard)
    del tensors[f"{Q0}.weight_u"]
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"lacks .*q_proj\.weight_u"):
        load(tmp_path)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: ",".join(v) or "plain")
def test_a_low_rank_layer_without_rank_entry_is_an_error(
    variant: dict[str, Any], qwen2: Folder
) -> None:
    edit_ranks(qwen2.path, lambda ranks: ranks.pop(UP1))
    with pytest.raises(RuntimeError, match=r"up_proj\.weight|size mismatch|ignore_mismatched"):
        load(qwen2.path, **variant)


@pytest.mark.parametrize(
    "name", ["model.layers.7.mlp.up_proj", "model.layers.0.mlp", "model.norm", "nonsense"]
)
def test_a_rank_for_what_is_no_linear_is_an_error(name: str, qwen2: Folder) -> None:
    edit_ranks(qwen2.path, lambda ranks: ranks.update({name: 3}))
    with pytest.raises(ValueError, match=rf"neither linear nor .* in Qwen2ForCausalLM: {name}"):
        load(qwen2.path)


def test_a_rank_for_what_is_no_linear_is_an_error_without_head(qwen2: Folder) -> None:
    edit_ranks(qwen2.path, lambda ranks: ranks.update({"model.layers.7.mlp.up_proj": 3}))
    with pytest.raises(ValueError, match=r"neither linear nor .* in Qwen2Model: model\.layers\.7"):
        AutoModel.from_pretrained(qwen2.path)


@pytest.mark.parametrize("rank", [0, -3, 2.5, "6", True, None])
def test_a_rank_that_is_no_positive_integer_is_an_error(rank: object, qwen2: Folder) -> None:
    edit_ranks(qwen2.path, lambda ranks: ranks.update({Q0: rank}))
    with pytest.raises(ValueError, match=rf"positive integers: {Q0}: {rank!r}"):
        load(qwen2.path)


def test_ranks_that_are_no_mapping_are_an_error() -> None:
    with pytest.raises(ValueError, match="must map names to integers"):
        HiSVDConfig([3, 4])  # type: ignore[arg-type]


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_an_unknown_format_version_is_an_error(version: object, qwen2: Folder) -> None:
    written = json.loads((qwen2.path / "config.json").read_text())["quantization_config"]
    edit_config(qwen2.path, quantization_config={**written, "format_version": version})
    with pytest.raises(ValueError, match=rf"format version {version!r}.*supports version 1"):
        load(qwen2.path)


def test_an_unknown_storage_is_an_error(qwen2: Folder) -> None:
    written = json.loads((qwen2.path / "config.json").read_text())["quantization_config"]
    edit_config(qwen2.path, quantization_config={**written, "storage": "folded"})
    with pytest.raises(ValueError, match="storage 'folded'"):
        load(qwen2.path)


def test_outputs_out_of_order_are_an_error(pristine: MakeFolder, tmp_path: Path) -> None:
    path = Path(shutil.copytree(pristine("llama", "pivoted").path, tmp_path / "disordered"))
    name = f"{Q0}.weight_order"
    edit_tensors(path, lambda t: t[name].fill_(3))  # a row twice, others never
    with pytest.raises(RuntimeError, match=rf"a permutation: {re.escape(name)}\."):
        load(path)


def test_a_pivoted_checkpoint_is_no_plain_one(pristine: MakeFolder, tmp_path: Path) -> None:
    """Neither loads as the other: a reader that knows plain pairs only must not misread it."""
    path = Path(shutil.copytree(pristine("llama", "pivoted").path, tmp_path / "mistaken"))
    ranks = json.loads((path / "config.json").read_text())["quantization_config"]["ranks"]
    edit_config(path, quantization_config=HiSVDConfig(ranks).to_dict())
    with pytest.raises(RuntimeError, match="weight_u is"):
        load(path)


def test_a_tied_head_cannot_be_low_rank(pristine: MakeFolder, tmp_path: Path) -> None:
    path = Path(shutil.copytree(pristine("llama").path, tmp_path / "tied"))
    edit_ranks(path, lambda ranks: ranks.update(lm_head=3))
    edit_tensors(path, lambda t: t.update({"lm_head.weight_u": torch.zeros(40, 3)}))
    with pytest.raises(RuntimeError, match=r"lm_head\.weight"):
        load(path)


def test_an_unseen_loading_report_is_an_error() -> None:
    quantizer = HiSVDQuantizer(HiSVDConfig({}), pre_quantized=True)
    with pytest.raises(RuntimeError, match="is not supported"):
        quantizer._process_model_after_weight_loading(dense_model("llama"))


def test_a_dense_model_cannot_be_made_low_rank_by_loading(tmp_path: Path) -> None:
    dense_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        load(tmp_path, quantization_config=HiSVDConfig({Q0: 3}))


# --- configuration and registration --------------------------------------------------------------


def test_config_round_trip() -> None:
    config = HiSVDConfig({Q0: 3})
    written = {"quant_method": "hisvd", "format_version": 1, "ranks": {Q0: 3}}
    assert config.to_dict() == written
    assert HiSVDConfig(**json.loads(config.to_json_string(use_diff=False))).to_dict() == written


def test_registering_again_changes_nothing() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    register()
    assert AUTO_QUANTIZER_MAPPING["hisvd"] is HiSVDQuantizer


def python(script: str, *arguments: object, cache: Path, isolated: bool = False) -> str:
    """Run a script in a fresh interpreter and return what it printed.

    Args:
        isolated: run it elsewhere than in the repository, and with an importer that refuses
            hisvd_cli, so that it is as if hisvd were not installed.
    """
    if isolated:
        script = BLOCKER + script
    result = subprocess.run(
        [sys.executable, *(["-I"] if isolated else []), "-c", script, *map(str, arguments)],
        cwd=cache if isolated else REPOSITORY,
        env={**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hisvd_cli":
            raise ModuleNotFoundError("hisvd_cli is not installed here")
sys.meta_path.insert(0, Blocker())
"""


def test_importing_hisvd_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    script = """
import sys, hisvd_cli
heavy = {"torch", "transformers", "safetensors", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    python(script, cache=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import hisvd_cli, transformers",
        "import transformers.quantizers.auto, hisvd_cli",
        "import hisvd_cli.modeling.layers.transformers_plugin",
    ],
)
def test_any_order_of_imports_registers_once(imports: str, tmp_path: Path) -> None:
    script = f"""
import sys
finders = list(sys.meta_path)
{imports}
import importlib.util
importlib.util.find_spec("transformers.quantizers.auto")  # a mere look must not use up the hook
from transformers.quantizers import auto
from hisvd_cli.modeling.layers.transformers_plugin import HiSVDConfig, HiSVDQuantizer
assert auto.AUTO_QUANTIZER_MAPPING["hisvd"] is HiSVDQuantizer
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["hisvd"] is HiSVDConfig
assert "hisvd_cli" not in type(auto.__loader__).__module__
assert auto.__spec__.loader is auto.__loader__
waiting = [f.name for f in sys.meta_path if "hisvd_cli" in type(f).__module__]
assert waiting == ["peft.tuners.lora.model"]  # which nothing here imports
"""
    python(script, cache=tmp_path)


# --- code that travels with the checkpoint -------------------------------------------------------


def test_remote_code_files_exist_and_name_the_auto_map() -> None:
    files = remote_code_files()
    assert set(files) == {
        MODELING_FILE,
        "lowrank.py",
        "quantized.py",
        "peft_support.py",
        "import_hooks.py",
        "factored.py",
        "experts.py",
        "replacement.py",
        "conversions.py",
    }
    assert all(path.is_file() for path in files.values())
    module, class_name = AUTO_MAP["AutoModelForCausalLM"].split(".")
    assert f"{module}.py" == MODELING_FILE
    assert f"class {class_name}" in files[MODELING_FILE].read_text()


REMOTE = """
import sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM
folder, out, ids = Path(sys.argv[1]), Path(sys.argv[2]), torch.tensor(eval(sys.argv[3]))
for path in sorted(p for p in folder.iterdir() if p.is_dir()):
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers.models."), type(model)
    target = out / path.name
    model.save_pretrained(target)
    again = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)
    with torch.no_grad():
        torch.save((model(ids).logits, again(ids).logits), target / "logits.pt")
config = AutoConfig.from_pretrained(path)
shape = AutoModelForCausalLM.from_config(config, trust_remote_code=True).state_dict()
assert {k: v.shape for k, v in shape.items()} == {k: v.shape for k, v in model.state_dict().items()}
assert "hisvd_cli" not in sys.modules
"""


def test_without_hisvd_the_folder_brings_its_code(pristine: MakeFolder, tmp_path: Path) -> None:
    folders = {name: pristine(name) for name in ("llama", "opt", "qwen2")}
    source, out = tmp_path / "source", tmp_path / "out"
    for name, folder in folders.items():
        shutil.copytree(folder.path, source / name)
    out.mkdir()
    python(REMOTE, source, out, IDS.tolist(), cache=tmp_path, isolated=True)
    for name, folder in folders.items():
        first, again = torch.load(out / name / "logits.pt")
        torch.testing.assert_close(first, folder.expected(), rtol=1e-4, atol=1e-4)
        assert torch.equal(first, again)
        # What a process without hisvd has saved loads in one with hisvd, either way.
        assert torch.equal(logits(load(out / name)), logits(load(folder.path)))


@pytest.mark.slow
def test_without_any_code_the_folder_fails_closed(pristine: MakeFolder, tmp_path: Path) -> None:
    script = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError as error:
    print("refused", type(error).__name__)
"""
    output = python(script, pristine("llama").path, cache=tmp_path, isolated=True)
    assert "refused RuntimeError" in output


def test_remote_code_and_an_installed_hisvd_get_along(pristine: MakeFolder, tmp_path: Path) -> None:
    folder = pristine("llama")
    model = load(folder.path, trust_remote_code=True)
    assert all(type(layer) is LowRankLinear for layer in low_rank_layers(model).values())
    model.save_pretrained(tmp_path)
    for trust in (True, False):
        assert torch.equal(logits(load(tmp_path, trust_remote_code=trust)), logits(model))


def test_a_folder_without_auto_map_is_saved_without_code(qwen2: Folder, tmp_path: Path) -> None:
    edit_config(qwen2.path, auto_map={})
    load(qwen2.path).save_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").glob("*.py"))
    torch.testing.assert_close(
        logits(load(tmp_path / "again")), qwen2.expected(), rtol=1e-4, atol=1e-4
    )


def test_the_code_of_a_hub_repository_becomes_the_folder_s_own(
    qwen2: Folder, tmp_path: Path
) -> None:
    # This is what transformers makes of an auto_map that it reads from a hub repository.
    remote = {key: f"someone/model--{value}" for key, value in AUTO_MAP.items()}
    edit_config(qwen2.path, auto_map=remote)
    load(qwen2.path, trust_remote_code=False).save_pretrained(tmp_path / "again")
    saved = AutoConfig.from_pretrained(tmp_path / "again")
    assert saved.auto_map == AUTO_MAP
    assert (tmp_path / "again" / MODELING_FILE).is_file()
    assert load(tmp_path / "again", trust_remote_code=True) is not None
