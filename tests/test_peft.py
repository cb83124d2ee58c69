"""A compressed model in the hands of peft, and cast as a whole."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hisvd_cli.modeling.layers.lowrank import LowRankLinear
from tests.cli_helpers import QUICK, environment, succeed
from tests.models import random_tokens

peft = pytest.importorskip("peft")
KINDS = {
    "pair": (),
    "pivoted": ("--storage", "pivoted"),
    "int8": ("--quantize", "int8"),
    "int4": ("--quantize", "int4"),
}
TOKENS = random_tokens(2, 12)
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints of the demo by storage, each made once."""
    home = tmp_path_factory.mktemp("checkpoints")

    def made(kind: str) -> Path:
        if not (home / kind).exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("HISVD_CACHE", str(home / "cache"))
                words = ("--ratio", 0.5, "--no-evaluate", "--output", home / kind)
                succeed("compress", *QUICK, *words, *KINDS[kind])
        return home / kind

    return made


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def adapted(model: Any, **settings: Any) -> Any:
    """Put adapters on a model, and draw all of their numbers."""
    found = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings})
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in found.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_trained_saved_and_loaded(
    kind: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    before = logits(load(folder(kind)))
    model = adapted(load(folder(kind)))
    changed = logits(model)
    assert not torch.allclose(changed, before, atol=1e-3)
    model(TOKENS, labels=TOKENS).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 6
    assert all("lora_" in name for name in trained)
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained.values())
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder(kind)), tmp_path / "adapter")
    assert torch.equal(logits(again), changed)
    with again.disable_adapter():
        assert torch.equal(logits(again), before)


@pytest.mark.parametrize("kind", ["pair", "pivoted"])
def test_merged_adapters_give_the_same_logits_and_are_saved(
    kind: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = adapted(load(folder(kind)))
    expected = logits(model)
    ranks = dict(model.config.quantization_config.ranks)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    torch.testing.assert_close(logits(again), expected, atol=1e-4, rtol=1e-4)
    kept = again.config.quantization_config.ranks
    name = "model.layers.0.mlp.down_proj"
    if kind == "pair":
        assert kept[name] == ranks[name] + 4
        assert isinstance(again.get_submodule(name), LowRankLinear)
    else:
        assert name not in kept
    assert kept["model.layers.0.mlp.up_proj"] == ranks["model.layers.0.mlp.up_proj"]


def test_a_merge_is_undone_and_several_add_up(folder: Callable[[str], Path]) -> None:
    before = logits(load(folder("pair")))
    model = adapted(load(folder("pair")))
    changed = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), changed, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), changed)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    many = adapted(load(folder("pair")), r=200)  # more than the matrix has: dense
    expected = logits(many)
    merged = many.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), expected, atol=1e-3, rtol=1e-3)
    assert isinstance(merged.get_submodule("model.layers.0.self_attn.q_proj"), torch.nn.Linear)


def test_integers_are_not_merged_silently(folder: Callable[[str], Path]) -> None:
    model = adapted(load(folder("int8")))
    with pytest.raises(ValueError, match="dequantize"):
        model.merge_and_unload()
    plain = load(folder("int8")).dequantize()
    model = adapted(plain)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_adapters_that_need_the_dense_weight_are_refused(
    settings: dict[str, Any], folder: Callable[[str], Path]
) -> None:
    config = peft.LoraConfig(r=4, target_modules=TARGETS, **settings)
    with pytest.raises(ValueError, match="dense weights"):
        peft.get_peft_model(load(folder("pair")), config)


@pytest.mark.parametrize("leaf", ["weight", "weight_u"])
def test_adapters_of_one_factor(leaf: str, folder: Callable[[str], Path]) -> None:
    before = logits(load(folder("pair")))
    model = adapted(load(folder("pair")), target_modules=[], target_parameters=[f"q_proj.{leaf}"])
    changed = logits(model)
    assert not torch.allclose(changed, before, atol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), changed, atol=1e-4, rtol=1e-4)


def test_dense_models_are_adapted_as_before() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=300,
    )
    model = adapted(AutoModelForCausalLM.from_config(config))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer) is peft.tuners.lora.layer.Linear


@pytest.mark.slow
def test_without_hisvd_the_code_of_the_folder_does_it(folder: Callable[[str], Path]) -> None:
    code = (
        "import sys; sys.modules['hisvd_cli'] = None\n"
        "import torch, peft\n"
        "from transformers import AutoModelForCausalLM as A\n"
        f"m = A.from_pretrained({str(folder('pair'))!r}, trust_remote_code=True)\n"
        "m = m.float()\n"
        f"p = peft.get_peft_model(m, peft.LoraConfig(r=2, target_modules={TARGETS!r}))\n"
        "print(type(p.merge_and_unload()).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "LlamaForCausalLM", done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_models_are_cast(kind: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(folder(kind))
    expected = logits(model)
    for cast in ("half", "bfloat16", "float"):
        model = getattr(model, cast)()
        floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
        assert floats == {{"half": torch.float16}.get(cast, getattr(torch, cast, torch.float32))}
    # Two roundings in all, to 11 and to 8 bits.
    torch.testing.assert_close(logits(model), expected, atol=0.15, rtol=0.05)
    twin = copy.deepcopy(model).half()
    assert twin.dtype == torch.float16
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "saved")
    # The model's rotary frequencies went through bfloat16 too; those that are loaded did not.
    torch.testing.assert_close(
        logits(load(tmp_path / "saved")), logits(model), atol=5e-3, rtol=5e-3
    )


def test_the_code_of_a_checkpoint_does_not_require_peft() -> None:
    """Transformers asks for whatever the code of a repository imports outside of ``try``."""
    from transformers.dynamic_module_utils import get_imports

    from hisvd_cli.modeling.layers.transformers_plugin import remote_code_files

    for path in remote_code_files().values():
        assert {"peft", "hisvd_cli"}.isdisjoint(get_imports(path)), path


def test_one_factor_of_integers_is_refused(folder: Callable[[str], Path]) -> None:
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"])
    with pytest.raises(ValueError, match="whole layer"):
        peft.get_peft_model(load(folder("int8")), config)
