"""Low-rank stacks of experts in plain transformers, against models with multiplied factors.

The factors are random, and the dense reference is made by the test's own products, in the
orientation that a table here states. No test downloads anything.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.pytorch_utils import Conv1D

from hisvd_cli.modeling.layers.conversions import Reversed, excepted, with_and_without
from hisvd_cli.modeling.layers.experts import LowRankExperts, find_stack
from hisvd_cli.modeling.layers.lowrank import LowRankLinear
from hisvd_cli.modeling.layers.transformers_plugin import (
    AUTO_MAP,
    HiSVDConfig,
    HiSVDForCausalLM,
    auto_map,
    remote_code_files,
    replace_linears,
)

if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("transformers 4 has no stacks of experts", allow_module_level=True)

RANK = 6  # neither 16 bytes nor a divisor of any width
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
_SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_LATENT = {
    **{"q_lora_rank": 12, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4},
    **{"v_head_dim": 8, "n_group": 2, "topk_group": 1, "n_routed_experts": 4},
    **{"num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    **{"moe_intermediate_size": 20, "num_key_value_heads": 4, "head_dim": 4},
}
_HYBRID = {
    "layers_block_type": ["moe", "full_attention"],
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    **{"moe_intermediate_size": 20, "moe_shared_expert_intermediate_size": 28},
    **{"n_group": 2, "topk_group": 1},
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "qwen3_moe": ("Qwen3MoeConfig", _QWEN, False),
    "mixtral": ("MixtralConfig", _LOCAL, False),
    "gpt_oss": ("GptOssConfig", _LOCAL, True),
    "llama4": (
        "Llama4TextConfig",
        {**_LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 32},
        True,
    ),
    "granitemoe": ("GraniteMoeConfig", _LOCAL, False),
    "deepseek_v3": ("DeepseekV3Config", _LATENT, False),
    "nemotron_h": ("NemotronHConfig", _HYBRID, False),
    "jetmoe": ("JetMoeConfig", {**_LOCAL, "kv_channels": 6}, False),
}
"""Name → class of the config, sizes, and whether the experts are stored as inputs × outputs."""
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
FIXED = ("llama4", "jetmoe")  # have only their own code for experts

Model = Any  # transformers' own model classes say little to a type checker


@dataclass
class Folder:
    """A checkpoint, and the dense model that it must equal."""

    path: Path
    dense: Model
    factors: dict[str, tuple[Tensor, Tensor]]


def draw(model: nn.Module, seed: int = 0) -> None:
    """Make every parameter random, biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def build(architecture: str) -> Model:
    """Build a tiny dense model with random numbers in every tensor."""
    kind, extra, _ = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**_SIZES, **extra}))
    draw(model)
    return model.eval()


def stacks_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the stacked parameters: those with three dimensions that are no convolution's."""
    return {n: p for n, p in model.named_parameters() if p.dim() == 3 and "conv" not in n}


def multiplied(v: Tensor, u: Tensor, transposed: bool) -> Tensor:
    """Return the dense stack of V ``[E, r, n]`` and U ``[E, m, r]``, one of them maybe common."""
    count = max(len(v) if v.dim() == 3 else 0, len(u) if u.dim() == 3 else 0)
    rows = []
    for e in range(count):
        matrix = (u if u.dim() == 2 else u[e]) @ (v if v.dim() == 2 else v[e])
        rows.append(matrix.T if transposed else matrix)
    return torch.stack(rows)


def factor(model: Model, transposed: bool, layout: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Give every stack of a model random factors, multiplied out; return them by name."""
    factors = {}
    generator = torch.Generator().manual_seed(7)
    for name, parameter in stacks_of(model).items():
        count, a, b = parameter.shape
        m, n = (b, a) if transposed else (a, b)
        v = torch.randn((count, RANK, n), generator=generator) / n**0.5
        u = torch.randn((count, m, RANK), generator=generator) / RANK**0.5
        v = v[0] if layout == "shared-v" else v
        u = u[0] if layout == "shared-u" else u
        parameter.data = multiplied(v, u, transposed)
        factors[name] = v.contiguous(), u.contiguous()
    assert factors
    return factors


def write(folder: Path, model: Model, tensors: dict[str, Tensor], **quantization: Any) -> None:
    """Write a checkpoint as the documentation of its format says, with the code that travels."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    file = folder / "config.json"
    document = json.loads(file.read_text())
    document["auto_map"] = AUTO_MAP
    document["quantization_config"] = {"quant_method": "hisvd", **quantization}
    file.write_text(json.dumps(document))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    for name, source in remote_code_files().items():
        shutil.copyfile(source, folder / name)


def make(folder: Path, architecture: str, layout: str = "separate") -> Folder:
    """Write the checkpoint of an architecture."""
    model = build(architecture)
    factors = factor(model, ARCHITECTURES[architecture][2], layout)
    tensors = {n: t for n, t in model.state_dict().items() if n not in factors}
    for name, (v, u) in factors.items():
        tensors |= {f"{name}.weight": v, f"{name}.weight_u": u}
    ranks = dict.fromkeys(factors, RANK)
    write(folder, model, tensors, format_version=4, experts=layout, ranks=ranks)
    return Folder(folder, model, factors)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Folder]:
    """Give the folder of an architecture; made once, not to be changed."""
    made: dict[tuple[str, str], Folder] = {}

    def give(architecture: str, layout: str = "separate") -> Folder:
        key = architecture, layout
        if key not in made:
            path = tmp_path_factory.mktemp(architecture) / layout
            made[key] = make(path, architecture, layout)
        return made[key]

    return give


def load(path: Path, implementation: str | None = None, **kwargs: Any) -> Model:
    """Load a folder as any user does."""
    if implementation is not None:
        kwargs["experts_implementation"] = implementation
    return AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()


def logits(model: Model) -> Tensor:
    """Return the logits for ``IDS``, ``[2, 8, vocabulary]``."""
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def expected(folder: Folder) -> Tensor:
    """Return the logits of the dense model, computed by the loop over experts."""
    if any(folder.dense.config.model_type.startswith(kind) for kind in FIXED):
        return logits(folder.dense)
    folder.dense.set_experts_implementation("eager")
    return logits(folder.dense)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Compare within a tolerance relative to the largest value."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


CASES = [
    (architecture, implementation)
    for architecture in ARCHITECTURES
    for implementation in (IMPLEMENTATIONS if architecture not in FIXED else (None,))
]


@pytest.mark.parametrize(("architecture", "implementation"), CASES)
def test_logits_equal_those_of_the_multiplied_model(
    architecture: str, implementation: str | None, pristine: Callable[..., Folder]
) -> None:
    folder = pristine(architecture)
    model = load(folder.path, implementation)
    layers = [m for m in model.modules() if isinstance(m, LowRankExperts)]
    assert len(layers) == len(folder.factors)
    assert not stacks_of(model).keys() & folder.factors.keys()
    assert_close(logits(model), expected(folder))


@pytest.mark.parametrize("layout", ["shared-v", "shared-u"])
@pytest.mark.parametrize(("architecture", "implementation"), CASES)
def test_common_factors(
    architecture: str, implementation: str | None, layout: str, pristine: Callable[..., Folder]
) -> None:
    folder = pristine(architecture, layout)
    assert_close(logits(load(folder.path, implementation)), expected(folder))


@pytest.mark.parametrize("layout", ["separate", "shared-v", "shared-u"])
@pytest.mark.parametrize(("architecture", "implementation"), CASES)
def test_gradients_follow_the_chain_rule(
    architecture: str, implementation: str | None, layout: str, pristine: Callable[..., Folder]
) -> None:
    folder = pristine(architecture, layout)
    transposed = ARCHITECTURES[architecture][2]
    dense = copy.deepcopy(folder.dense)
    model = load(folder.path, implementation)
    for one in (dense, model):
        one(IDS, labels=IDS).loss.backward()
    for name, (v, u) in folder.factors.items():
        whole = dense.get_parameter(name).grad
        g = whole.mT if transposed else whole  # [E, m, n]
        stack = model.get_submodule(name)
        of_v, of_u = u.mT @ g, g @ v.mT
        assert_close(stack.weight.grad, of_v.sum(0) if v.dim() == 2 else of_v, 1e-4)
        assert_close(stack.weight_u.grad, of_u.sum(0) if u.dim() == 2 else of_u, 1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saving_again_keeps_names_and_tensors(
    architecture: str, pristine: Callable[..., Folder], tmp_path: Path
) -> None:
    folder = pristine(architecture)
    model = load(folder.path)
    model.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    for name, (v, u) in folder.factors.items():
        assert torch.equal(saved[f"{name}.weight"], v)
        assert torch.equal(saved[f"{name}.weight_u"], u)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    before = json.loads((folder.path / "config.json").read_text())
    assert config["quantization_config"] == before["quantization_config"]
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_from_a_config_saves_what_loads_again(
    architecture: str, pristine: Callable[..., Folder], tmp_path: Path
) -> None:
    """Such a model was not loaded, so that transformers takes every conversion rule of its type."""
    config = transformers.AutoConfig.from_pretrained(pristine(architecture).path)
    model = HiSVDForCausalLM._from_config(config).eval()
    draw(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {f"{n}.weight_u" for n in pristine(architecture).factors} <= saved.keys()
    assert_close(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "llama4", "nemotron_h"])
def test_dequantize_gives_the_stacks_back(
    architecture: str, pristine: Callable[..., Folder], tmp_path: Path
) -> None:
    folder = pristine(architecture)
    model = load(folder.path)
    model.dequantize()
    for name, parameter in stacks_of(folder.dense).items():
        found = model.get_parameter(name)
        assert found.requires_grad
        assert found.shape == parameter.shape
        assert_close(found.detach(), parameter.detach())
    assert_close(logits(model), expected(folder))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"auto_map", "quantization_config"} & config.keys()
    assert_close(logits(load(tmp_path)), expected(folder))


def test_casts(pristine: Callable[..., Folder]) -> None:
    folder = pristine("gpt_oss")
    for implementation in IMPLEMENTATIONS:
        model = load(folder.path, implementation, dtype=torch.bfloat16)
        stacks = [m for m in model.modules() if isinstance(m, LowRankExperts)]
        assert {m.dtype for m in stacks} == {torch.bfloat16}
        assert_close(logits(model).float(), expected(folder), 0.1)
        assert model.float() is model
        assert {m.dtype for m in stacks} == {torch.float32}
        assert_close(logits(model), expected(folder), 0.1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_stacks_on_disk(
    implementation: str, pristine: Callable[..., Folder], tmp_path: Path
) -> None:
    folder = pristine("qwen3_moe")
    rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    places = {**dict.fromkeys(rest, "cpu"), "model.layers.1": "disk"}
    model = load(folder.path, implementation, device_map=places, offload_folder=tmp_path)
    stack = model.get_submodule("model.layers.1.mlp.experts.down_proj")
    assert stack.weight.is_meta
    assert not model.model.layers[0].mlp.experts.down_proj.weight.is_meta
    for _ in range(2):
        assert_close(logits(model), expected(folder))
        assert stack.weight.is_meta
    with pytest.raises(ValueError, match=r"offloaded: model\.layers\.1\."):
        model.dequantize()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "implementation"),
    [("qwen3_moe", "grouped_mm"), ("gpt_oss", "batched_mm"), ("llama4", None)],
)
def test_a_model_compiles_into_one_graph(
    architecture: str, implementation: str | None, pristine: Callable[..., Folder]
) -> None:
    folder = pristine(architecture)
    compiled = torch.compile(load(folder.path, implementation), backend="eager", fullgraph=True)
    assert_close(logits(compiled), expected(folder))


@pytest.mark.slow
def test_the_loop_over_experts_compiles_with_graph_breaks(pristine: Callable[..., Folder]) -> None:
    folder = pristine("qwen3_moe")
    compiled = torch.compile(load(folder.path, "eager"), backend="eager")
    assert_close(logits(compiled), expected(folder))


def test_copies_and_pickles(pristine: Callable[..., Folder]) -> None:
    folder = pristine("deepseek_v3")
    model = load(folder.path)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))


REMOTE = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hisvd_cli":
            raise ModuleNotFoundError("hisvd_cli is not installed here")
sys.meta_path.insert(0, Blocker())
ids = torch.tensor(eval(sys.argv[2]))
for path in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers.models."), type(model)
    model.save_pretrained(path / "again")
    again = AutoModelForCausalLM.from_pretrained(path / "again", trust_remote_code=True)
    with torch.no_grad():
        torch.save((model(ids).logits, again(ids).logits), path / "logits.pt")
"""


def run(script: str, folder: Path, *arguments: object, isolated: bool = False) -> None:
    """Run a script in a process of its own; isolated, as if hisvd were not installed."""
    result = subprocess.run(
        [sys.executable, *(["-I"] if isolated else []), "-c", script, *map(str, arguments)],
        cwd=folder if isolated else Path(__file__).parents[1],
        env={**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


def test_without_hisvd_the_folder_brings_its_code(
    pristine: Callable[..., Folder], tmp_path: Path
) -> None:
    folders = {name: pristine(name) for name in ARCHITECTURES}
    for name, folder in folders.items():
        shutil.copytree(folder.path, tmp_path / "source" / name)
    run(REMOTE, tmp_path, tmp_path / "source", IDS.tolist(), isolated=True)
    for name, folder in folders.items():
        first, again = torch.load(tmp_path / "source" / name / "logits.pt")
        assert_close(first, expected(folder))
        assert torch.equal(first, again)


# --- bad input -----------------------------------------------------------------------------------

STACK = "model.layers.0.mlp.experts.down_proj"  # of qwen3_moe: E 4, m 24, n 20


def damaged(
    folder: Folder, to: Path, edit: Callable[[dict[str, Tensor], dict[str, Any]], object]
) -> Path:
    """Copy a folder, and edit its tensors and its quantization_config."""
    shutil.copytree(folder.path, to)
    tensors = load_file(to / "model.safetensors")
    config = json.loads((to / "config.json").read_text())
    edit(tensors, config["quantization_config"])
    save_file({n: t.contiguous() for n, t in tensors.items()}, to / "model.safetensors")
    (to / "config.json").write_text(json.dumps(config))
    return to


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], object], str]] = {
    "V is missing": (lambda t, _: t.pop(f"{STACK}.weight"), f"lacks .*{STACK}.weight"),
    "U is missing": (lambda t, _: t.pop(f"{STACK}.weight_u"), f"lacks .*{STACK}.weight_u"),
    "one expert less": (
        lambda t, _: t.update({f"{STACK}.weight": t[f"{STACK}.weight"][1:]}),
        r"weight is \[3, 6, 20\] and should be \[4, 6, 20\]",
    ),
    "U is transposed": (
        lambda t, _: t.update({f"{STACK}.weight_u": t[f"{STACK}.weight_u"].mT}),
        r"weight_u is \[4, 6, 24\] and should be \[4, 24, 6\]",
    ),
    "another rank": (lambda _, q: q["ranks"].update({STACK: 5}), r"should be \[4, 24, 5\]"),
    "too large a rank": (lambda _, q: q["ranks"].update({STACK: 21}), "21 of .* exceeds .* 20"),
    "no rank": (lambda _, q: q["ranks"].pop(STACK), f"(lacks|low-rank) .*{STACK}"),
    "an unknown layout": (lambda _, q: q.update(experts="shared-w"), "experts 'shared-w'"),
    "another layout": (lambda _, q: q.update(experts="shared-v"), r"should be \[6, 24\]"),
    "no layout": (lambda _, q: q.pop("experts"), "version 4"),
    "an old version": (lambda _, q: q.update(format_version=1), "version 1"),
    "no version for stacks": (
        lambda _, q: (q.pop("experts"), q.update(format_version=1)),
        "lacks experts, although .* is a stack",
    ),
    "only other layers": (
        lambda _, q: q.update(ranks={"model.layers.0.self_attn.q_proj": 3}),
        "no name in quantization_config.ranks is a stack",
    ),
    "quantized": (lambda _, q: q.update(bits={STACK: 8}), f"bits: {STACK} is a stack"),
    "a name of nothing": (
        lambda _, q: q["ranks"].update({STACK + "s": 3}),
        f"neither linear nor stacks of experts in Qwen3MoeForCausalLM: {STACK}s",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_an_error(
    damage: str, pristine: Callable[..., Folder], tmp_path: Path
) -> None:
    edit, message = DAMAGES[damage]
    path = damaged(pristine("qwen3_moe"), tmp_path / "damaged", edit)
    with pytest.raises((RuntimeError, ValueError), match=message):
        load(path)


def test_transformers_4_is_told_to_be_too_old(
    pristine: Callable[..., Folder], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = build("qwen3_moe"), pristine("qwen3_moe").path
    quantization = transformers.AutoConfig.from_pretrained(path).quantization_config
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    with pytest.raises(ValueError, match=r"4\.57\.6 does not support\. Install transformers 5"):
        replace_linears(model, HiSVDConfig(**quantization))


def test_the_document_without_stacks_is_as_before() -> None:
    document = HiSVDConfig({"a": 3}).to_dict()
    assert document == {"quant_method": "hisvd", "format_version": 1, "ranks": {"a": 3}}
    assert auto_map() == AUTO_MAP
    assert list(AUTO_MAP) == ["AutoModelForCausalLM", "AutoConfig"]


def test_a_convolution_is_no_stack() -> None:
    assert find_stack(nn.Sequential(nn.Conv1d(4, 4, 3)), "0.weight") is None


# --- the layer -----------------------------------------------------------------------------------


def small(layout: Any = "separate", transposed: bool = False) -> tuple[LowRankExperts, Tensor]:
    """Return a stack of three experts, m 8, n 12, r 4, and its dense tensor."""
    torch.manual_seed(0)
    stack = LowRankExperts((3, 8, 12), 4, layout, transposed, "some.stack")
    v, u = stack.weight.detach(), stack.weight_u.detach()
    return stack, multiplied(v, u, transposed)


PRODUCTS: dict[str, Callable[[Any], Tensor]] = {
    "linear": lambda w: F.linear(torch.ones(2, w.shape[2]), w[1], torch.ones(w.shape[1])),
    "linear of a transpose": lambda w: F.linear(torch.ones(2, w.shape[1]), w[1].T),
    "matmul": lambda w: torch.matmul(torch.ones(2, w.shape[1]), w[torch.tensor(1)]),
    "mm": lambda w: torch.mm(torch.ones(2, w.size(1)), w[-1].to(torch.float32).contiguous()),
    "operator": lambda w: torch.ones(w.shape[1]) @ w[0],
    "operator from the left": lambda w: w[0] @ torch.ones(w.shape[2], 2),
    "bmm": lambda w: torch.bmm(torch.ones(3, 2, w.shape[1]), w),
    "bmm of a transpose": lambda w: torch.bmm(torch.ones(3, 2, w.size()[2]), w.transpose(1, 2)),
    "bmm from the left": lambda w: torch.bmm(w, torch.ones(3, w.shape[2], 1)),
    "bmm of chosen experts": lambda w: torch.bmm(
        w[torch.tensor([2, 0, 0, 1])], torch.ones(4, w.shape[2], 1)
    ),
    "experts in two dimensions": lambda w: (
        torch.ones(2, 2, 1, w.shape[1]) @ w[torch.tensor([[2, 0], [1, 1]])]
    ),
    "a slice": lambda w: torch.bmm(w[1:].mT, torch.ones(2, w.shape[1], 1)),
    "torch.transpose": lambda w: torch.transpose(w, -1, -2)[2] @ torch.ones(w.shape[1]),
    "grouped": lambda w: F.grouped_mm(
        torch.ones(5, w.shape[1]), w, offs=torch.tensor([2, 2, 5], dtype=torch.int32)
    ),
    "fallback": lambda w: torch.ops.transformers.grouped_mm_fallback(
        torch.ones(5, w.shape[2]), w.transpose(-2, -1), offs=torch.tensor([2, 2, 5])
    ),
    "float": lambda w: w[1].float() @ torch.ones(w.shape[2]),
    "every expert": lambda w: torch.stack([x @ torch.ones(w.shape[2]) for x in w]),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["separate", "shared-v", "shared-u"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_equal_those_of_the_dense_tensor(
    product: str, layout: str, transposed: bool
) -> None:
    stack, dense = small(layout, transposed)
    assert_close(PRODUCTS[product](stack).detach(), PRODUCTS[product](dense))
    assert_close(stack.dense_weight().detach(), dense)


@pytest.mark.parametrize("layout", ["separate", "shared-v", "shared-u"])
def test_ranks_that_are_not_aligned_are_padded_where_torch_requires_it(
    layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, and in compiled code, a loop over experts would be slow."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    stack = LowRankExperts((3, 8, 12), 5, layout, False, "some.stack")
    x = torch.randn(7, 12, requires_grad=True)
    view: Any = stack.transpose(-2, -1)
    offs = torch.tensor([3, 3, 7], dtype=torch.int32)
    y = F.grouped_mm(x, view, offs=offs)
    dense = stack.dense_weight()
    wanted = torch.cat([x[:3] @ dense[0].T, x[3:] @ dense[2].T])
    assert_close(y.detach(), wanted.detach())
    inputs = (x, stack.weight, stack.weight_u)
    for a, b in zip(
        *(torch.autograd.grad(out.square().sum(), inputs) for out in (y, wanted)), strict=True
    ):
        assert_close(a, b)


def test_a_stack_looks_like_the_tensor() -> None:
    stack, dense = small(transposed=True)
    for a, b in ((stack, dense), (stack[0], dense[0]), (stack[:2].mT, dense[:2].mT)):
        assert (a.shape, a.size(), a.size(-1), a.ndim, a.dim(), len(a)) == (
            *(b.shape, b.size(), b.size(-1), b.ndim, b.dim(), len(b)),
        )
        assert (a.dtype, a.device) == (b.dtype, b.device)


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "einsum": (lambda w: torch.einsum("emn,en->em", torch.ones(3, 8, 12), w), "einsum"),
    "addition": (lambda w: torch.ones(3, 8, 12) + w, "add"),
    "a sum from the left": (lambda w: w[0] + 1, "arithmetic"),
    "cat": (lambda w: torch.cat([torch.ones(8, 12), w[0]]), "cat"),
    "initialization": (lambda w: nn.init.normal_(w[0]), "normal_"),
    "an attribute": (lambda w: w.permute(0, 2, 1), r"\.permute"),
    "an attribute of an expert": (lambda w: w[0].view(-1), r"\.view"),
    "other transposes": (lambda w: w.transpose(0, 1), r"transpose\(0, 1\)"),
    "T of a stack": (lambda w: w.T, r"\.T of a stack"),
    "an index of two dimensions": (lambda w: w[0, 1], r"index \(0, 1\)"),
    "an index of one expert": (lambda w: w[0][1], "index 1"),
    "a product of two": (lambda w: w @ w, "matmul"),
    "out": (lambda w: torch.mm(torch.ones(2, 8), w[0], out=torch.ones(2, 12)), "mm"),
    "linear of a stack": (lambda w: F.linear(torch.ones(2, 12), w), "linear"),
    "a grouped bias": (
        lambda w: torch._grouped_mm(
            torch.ones(3, 8), w, torch.tensor([1, 2, 3], dtype=torch.int32), torch.ones(3, 12)
        ),
        "_grouped_mm",
    ),
}


@pytest.mark.parametrize("operation", REFUSED)
def test_what_is_not_supported_is_an_error_that_names_it(operation: str) -> None:
    run, name = REFUSED[operation]
    with pytest.raises((NotImplementedError, AttributeError), match=rf"some\.stack .*{name}"):
        run(small()[0])


@pytest.mark.parametrize(("rank", "layout"), [(0, "separate"), (2, "shared")])
def test_invalid_arguments(rank: int, layout: Any) -> None:
    with pytest.raises(ValueError, match=r"at least 1|Unknown layout"):
        LowRankExperts((3, 8, 12), rank, layout)


# --- conversion rules of transformers ------------------------------------------------------------


def rules_for_experts() -> list[tuple[str, str]]:
    """Return (key of the mapping, name of a stack) for all that the rules of transformers merge."""
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping

    found = set()
    for key, rules in _build_checkpoint_conversion_mapping().items():
        for rule in rules:
            for target in rule.target_patterns:
                name = target.replace("\\", "").strip(".^")
                if "experts" in name and re.fullmatch(r"[a-z_.]+_proj", name):
                    found.add((key, f"model.layers.0.{name}"))
    assert len(found) > 40
    return sorted(found)


def test_no_rule_of_any_architecture_changes_the_names_of_factors() -> None:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    def renamed(rules: list[Any], name: str, reverse: bool) -> tuple[str, str | None]:
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        changed: tuple[str, str | None] = rename_source_key(
            name, renamings, converters, reverse=reverse
        )
        return changed

    harmful = 0
    for key, stack in rules_for_experts():
        names = [f"{stack}.{leaf}" for leaf in ("weight", "weight_u")]
        kept = with_and_without("model", names)
        for name in (*names, *(n.removeprefix("model.") for n in names)):
            for reverse in (False, True):
                plain = get_checkpoint_conversion_mapping(key)
                rules = [r.reverse_transform() for r in plain[::-1]] if reverse else plain
                harmful += renamed(rules, name, reverse) != (name, None)
                if reverse:
                    fresh = get_checkpoint_conversion_mapping(key)[::-1]
                    rules = [Reversed(rule, kept).reverse_transform() for rule in fresh]
                else:
                    rules = [excepted(rule, kept) for rule in rules]
                assert renamed(rules, name, reverse) == (name, None), (key, name)
                assert renamed(rules, "model.other.bias", reverse)[1] is None
    assert harmful > 40  # without the exceptions, the rules would apply to factors


# --- image-text models ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Give a Qwen3-VL-MoE, whose rules transpose the stacks without renaming them."""
    text = {**_SIZES, **_QWEN, "decoder_sparse_step": 1, "rope_parameters": None}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = transformers.Qwen3VLMoeConfig(
        text_config={**text, "rope_parameters": {**rope, "mrope_interleaved": True}},
        vision_config={
            **{"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2},
            **{"out_hidden_size": 24, "patch_size": 4, "num_position_embeddings": 16},
            "deepstack_visual_indexes": [0],
        },
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    draw(model)
    factors = factor_of_text(model)
    tensors = {n: t for n, t in model.state_dict().items() if n not in factors}
    for name, (v, u) in factors.items():
        tensors |= {f"{name}.weight": v, f"{name}.weight_u": u}
    folder = tmp_path_factory.mktemp("vision") / "model"
    ranks = dict.fromkeys(factors, RANK)
    write(folder, model, tensors, format_version=4, experts="separate", ranks=ranks)
    edit = json.loads((folder / "config.json").read_text())
    edit["auto_map"] = auto_map("AutoModelForImageTextToText")
    (folder / "config.json").write_text(json.dumps(edit))
    return Folder(folder, model.eval(), factors)


def factor_of_text(model: Model) -> dict[str, tuple[Tensor, Tensor]]:
    """Factor the stacks of the decoder only."""
    inner = factor(model.model.language_model, False, "separate")
    return {f"model.language_model.{name}": pair for name, pair in inner.items()}


def test_an_image_text_model(vision: Folder, tmp_path: Path) -> None:
    for trust in (False, True):
        model = AutoModelForImageTextToText.from_pretrained(vision.path, trust_remote_code=trust)
        assert_close(logits(model.eval()), expected(vision))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == auto_map("AutoModelForImageTextToText")
    assert (tmp_path / "experts.py").is_file()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(logits(again.eval()), logits(model))


def test_an_image_text_model_without_head(vision: Folder) -> None:
    model = AutoModel.from_pretrained(vision.path).eval()
    dense = vision.dense.model
    with torch.no_grad():
        found, wanted = (m(input_ids=IDS).last_hidden_state for m in (model, dense))
    assert_close(found, wanted)


# --- Conv1D --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Give a GPT-2 with every Conv1D as a pair."""
    config = transformers.GPT2Config(vocab_size=40, n_positions=32, n_embd=24, n_layer=2, n_head=3)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    draw(model)
    tensors = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    factors = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            v, u = torch.randn(RANK, inputs) / inputs**0.5, torch.randn(outputs, RANK)
            module.weight.data = (u @ v).T.contiguous()
            factors[name] = v, u
            tensors |= {f"{name}.weight": v, f"{name}.weight_u": u}
    assert len(factors) == 8
    folder = tmp_path_factory.mktemp("gpt2") / "model"
    write(folder, model, tensors, format_version=1, ranks=dict.fromkeys(factors, RANK))
    return Folder(folder, model.eval(), factors)


def test_conv1d(gpt2: Folder, tmp_path: Path) -> None:
    model = load(gpt2.path)
    assert_close(logits(model), logits(gpt2.dense))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    model.dequantize()
    for name in gpt2.factors:
        found, wanted = model.get_submodule(name), gpt2.dense.get_submodule(name)
        assert type(found) is Conv1D
        assert_close(found.weight.detach(), wanted.weight.detach())
        assert torch.equal(found.bias, wanted.bias)
    model.save_pretrained(tmp_path / "dense")
    assert_close(logits(load(tmp_path / "dense")), logits(gpt2.dense))


def test_merging_adapters_gives_conv1d_back(gpt2: Folder) -> None:
    peft = pytest.importorskip("peft")
    targets = ["c_attn", "c_fc"]
    settings = {"init_lora_weights": False, "target_modules": targets, "task_type": "CAUSAL_LM"}
    for rank, kind in ((2, LowRankLinear), (20, Conv1D)):
        adapted = peft.get_peft_model(load(gpt2.path), peft.LoraConfig(r=rank, **settings)).eval()
        wanted = logits(adapted)
        merged = adapted.merge_and_unload()
        assert type(merged.transformer.h[0].mlp.c_fc) is kind
        assert_close(logits(merged), wanted)


ADAPTERS = """
import sys
from transformers import AutoModelForCausalLM
import hisvd_cli
import transformers.quantizers.auto
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
import hisvd_cli.modeling.layers.transformers_plugin as plugin
from hisvd_cli.modeling.layers.lowrank import LowRankLinear
from transformers.dynamic_module_utils import get_class_from_dynamic_module
entry = get_class_from_dynamic_module("modeling_hisvd.HiSVDForCausalLM", sys.argv[1])
copy = sys.modules[entry.__module__]
assert copy is not plugin
import peft
settings = peft.LoraConfig(r=2, target_modules=["c_fc"], task_type="CAUSAL_LM")
for code in (plugin, copy):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    model.transformer.h[0].mlp.c_fc = code.LowRankLinear(24, 96, 3)
    model.transformer.h[1].mlp.c_fc = code.LowRankLinear(24, 96, 3)
    peft.get_peft_model(model, settings)
"""


def test_adapters_work_on_layers_of_either_copy_of_the_code(gpt2: Folder, tmp_path: Path) -> None:
    """Both the installed code and that of a checkpoint wait for peft to be imported."""
    pytest.importorskip("peft")
    run(ADAPTERS, tmp_path, gpt2.path)


def test_a_quantized_conv1d(gpt2: Folder, tmp_path: Path) -> None:
    name = "transformer.h.0.mlp.c_fc"
    weight = gpt2.dense.get_submodule(name).weight.detach().T  # [m, n]
    scale = weight.abs().amax(1, keepdim=True).div(127).half()
    codes = weight.div(scale.float()).round().clamp(-127, 127).to(torch.int8)

    def edit(tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
        del tensors[f"{name}.weight_u"], quantization["ranks"][name]
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": scale.view(torch.int16)}
        quantization |= {"bits": {name: 8}, "format_version": 3}

    model = load(damaged(gpt2, tmp_path / "quantized", edit))
    dense = copy.deepcopy(gpt2.dense)
    dense.get_submodule(name).weight.data = (codes * scale.float()).T.contiguous()
    assert_close(logits(model), logits(dense))
    model.dequantize()
    assert type(model.get_submodule(name)) is Conv1D
    assert_close(logits(model), logits(dense))
