"""The checks themselves: they pass on a sound checkpoint, and each fails on a fault of its own."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.architectures import processes
from tests.architectures.case import Case
from tests.architectures.checks import STEPS, sentence_of
from tests.architectures.factors import multiply_out, read_tensors, stem_of
from tests.architectures.registry import architectures
from tests.architectures.results import Result
from tests.architectures.tiny import build, save
from tests.models import edit_json

LLAMA = architectures()["llama"]
FACTOR = "model.layers.0.self_attn.q_proj.weight_u"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("checks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISVD_CACHE", str(folder / "cache"))
        save(LLAMA, folder / "original")
        case = Case(LLAMA, folder / "original", folder)
        STEPS["compress"](case)
    return case


Damage = Callable[[dict[str, Tensor]], object]
DAMAGES: dict[str, tuple[Damage, str, str]] = {
    "a factor is 1 % larger": (lambda t: t[FACTOR].mul_(1.01), "factors", "q_proj is .* away"),
    "a norm is not the original's": (
        lambda t: t["model.norm.weight"].mul_(1.01),
        "logits",
        "logits differ",
    ),
    "a tensor is missing": (lambda t: t.pop("model.norm.weight"), "load", "lacks|missing keys"),
    "a tensor is superfluous": (
        lambda t: t.update(other=torch.ones(3)),
        "load",
        "1 unexpected keys, such as other.",
    ),
    "more is kept than planned": (
        lambda t: t.update(other=torch.ones(3)),
        "budget",
        "The files keep .* the plan says",
    ),
    "a value is not finite": (lambda t: t[FACTOR].fill_(torch.nan), "inspect", "NaN|finite"),
    "perplexity is not finite": (lambda t: t[FACTOR].fill_(torch.nan), "eval", "NaN|finite"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(name: str, sound: Case, tmp_path: Path) -> None:
    damage, step, told = DAMAGES[name]
    shutil.copytree(sound.checkpoint, tmp_path / "checkpoint")
    tensors = read_tensors(sound.checkpoint)
    damage(tensors)
    save_file(tensors, tmp_path / "checkpoint/model.safetensors", {"format": "pt"})
    case = Case(LLAMA, sound.original, tmp_path)
    with pytest.raises(Exception, match=told):
        STEPS[step](case)


@pytest.mark.parametrize(
    "step", ["load", "budget", "factors", "logits", "generate", "inspect", "eval"]
)
def test_a_sound_checkpoint_passes(step: str, sound: Case) -> None:
    STEPS[step](sound)


def test_a_wrong_product_is_found(sound: Case) -> None:
    case = Case(LLAMA, sound.original, sound.work)
    with torch.no_grad():
        case.loaded.get_parameter(FACTOR).mul_(1.01)
    with pytest.raises(AssertionError, match="logits differ"):
        STEPS["logits"](case)


def test_a_plan_beyond_the_budget_is_found(sound: Case, tmp_path: Path) -> None:
    case = Case(LLAMA, sound.original, tmp_path)
    shutil.copytree(sound.original, tmp_path / "checkpoint")
    shutil.copy(sound.checkpoint / "plan.json", tmp_path / "checkpoint")
    edit_json(
        tmp_path / "checkpoint/plan.json",
        kept_parameters=sum(math.prod(each["shape"]) for each in sound.plan["sublayers"]),
    )
    with pytest.raises(AssertionError, match="of a budget of"):
        STEPS["budget"](case)


def test_stacks_and_transposed_layers_are_multiplied_out(tmp_path: Path) -> None:
    for name, layer in (
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj"),
        ("gpt2", "transformer.h.0.mlp.c_fc"),
    ):
        model, folder = build(architectures()[name]), tmp_path / name
        parameter = model.get_parameter(layer if name == "gpt_oss" else f"{layer}.weight")
        u, s, v = torch.linalg.svd(parameter.detach().mT, full_matrices=False)
        folder.mkdir()
        (folder / "config.json").write_text(
            f'{{"quantization_config": {{"ranks": {{"{layer}": 9}}}}}}'
        )
        factors = {f"{layer}.weight_u": u * s.unsqueeze(-2), f"{layer}.weight": v}
        save_file(
            {key: each.contiguous() for key, each in factors.items()}, folder / "x.safetensors"
        )
        wanted = parameter.detach().clone()
        with torch.no_grad():
            parameter.zero_()
        multiply_out(model, folder)
        torch.testing.assert_close(parameter.detach(), wanted)


def test_factors_are_found_under_another_prefix() -> None:
    stored = ["a.layers.0.q_proj.weight_u", "a.layers.1.q_proj.weight_u", "b.0.k_proj.weight_u"]
    assert stem_of("model.layers.1.q_proj", stored) == "a.layers.1.q_proj"
    with pytest.raises(AssertionError, match="There is no"):
        stem_of("model.layers.1.o_proj", stored)


def test_errors_become_one_sentence(tmp_path: Path) -> None:
    error = ValueError(f"{tmp_path}/original is bad.\nSecond sentence.")
    assert sentence_of(error, tmp_path) == "ValueError: original is bad."
    assert sentence_of(KeyError(), tmp_path) == "KeyError: KeyError()"


@pytest.mark.slow
def test_a_process_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SECONDS", 0)
    found = list(processes.run_all([LLAMA], 1))
    assert found == [(LLAMA, Result("fails", "process", "It did not end within 0 s."))]
