"""The profiles that hisvd brings: each resolves, plans and compresses a model of the shapes that it
is meant for, at 1/64 of their width."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli

from hisvd_cli.cli.views.plans import plan_view
from hisvd_cli.cli.views.profiles import profiles_view
from hisvd_cli.pipelines.compressing.compression import compress_model
from hisvd_cli.pipelines.config.resolution import resolve
from hisvd_cli.pipelines.config.shipped import FOLDER, shipped_profiles
from hisvd_cli.utils.progress import Silent
from tests.cli_helpers import as_json, fail, succeed, text_file
from tests.models import CONFIGS, save_model
from tests.test_views import shown

NAMES = [path.stem for path in sorted(FOLDER.glob("*.toml"))]
# Widths are 1/64 of the model's, and the numbers of heads are the model's own: so are the ratios of
# grouped queries. Two blocks stand for all.
_COMMON = {"vocab_size": 300, "num_hidden_layers": 2, "max_position_embeddings": 128}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def shapes(hidden: int, inner: int, heads: int, groups: int, **more: Any) -> dict[str, Any]:
    return {
        **_COMMON,
        **_TOKENS,
        "hidden_size": hidden // 64,
        "intermediate_size": inner // 64,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "tie_word_embeddings": False,
        **more,
    }


SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-7b": ("LlamaConfig", shapes(4096, 11008, 32, 32)),
    "llama-13b": ("LlamaConfig", shapes(5120, 13824, 40, 40)),
    "llama-30b": ("LlamaConfig", shapes(6656, 17920, 52, 52)),
    "llama-2-7b": ("LlamaConfig", shapes(4096, 11008, 32, 32)),
    "llama-3-8b": ("LlamaConfig", shapes(4096, 14336, 32, 8)),
    "mistral-7b": ("MistralConfig", shapes(4096, 14336, 32, 8, sliding_window=4096 // 64)),
    "vicuna-7b": ("LlamaConfig", shapes(4096, 11008, 32, 32)),
    "qwen3-8b": ("Qwen3Config", shapes(4096, 12288, 32, 8, head_dim=2)),
    "opt-6.7b": (
        "OPTConfig",
        {
            **_COMMON,
            **_TOKENS,
            "hidden_size": 4096 // 64,
            "word_embed_proj_dim": 4096 // 64,
            "ffn_dim": 16384 // 64,
            "num_attention_heads": 32,
        },
    ),
}


def test_every_model_of_the_tables_has_a_profile() -> None:
    assert set(NAMES) == set(SCALED)


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_compresses_a_model_of_its_shapes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIGS, name, SCALED[name])
    model = save_model(name, tmp_path / "model")
    flags = {
        ("model", "name"): str(model),
        ("calibration", "dataset"): str(text_file(tmp_path, 300)),
        ("calibration", "samples"): 2,
        ("calibration", "seqlen"): 32,
        ("plan", "ratio"): [0.6],
    }
    resolved = resolve(flags, Path(name), environ={}, start=tmp_path)
    assert resolved.settings.eval.seqlen == 2048
    outcome = compress_model(resolved, tmp_path / "made", None, False, Silent())
    assert 0.59 < outcome.plan.kept_ratio <= 0.6
    types = {"q_proj", "k_proj", "v_proj"}
    assert types <= {row.cluster for row in outcome.plan.sublayers}
    assert max(map(len, shown(plan_view(outcome.plan, 80)))) <= 80


def test_profiles_are_alike_but_for_their_model() -> None:
    documents = [tomli.loads((FOLDER / f"{name}.toml").read_text()) for name in NAMES]
    models = {document.pop("model")["name"] for document in documents}
    assert len(models) == len(NAMES)
    assert all(document == documents[0] for document in documents)
    assert documents[0]["plan"]["ratio"] == [0.8, 0.6, 0.4]


def test_published_figures_name_their_source() -> None:
    published = json.loads((FOLDER / "published.json").read_text(encoding="utf-8"))
    assert set(published["profiles"]) == set(NAMES)
    used = {f["source"] for known in published["profiles"].values() for f in known["figures"]}
    assert used == set(published["sources"])
    for profile in shipped_profiles():
        for figure in profile.figures:
            assert set(figure.published) <= set(profile.ratios)
            # Less text of the model kept is never better, in any table.
            values = [figure.published.get(ratio) for ratio in profile.ratios]
            known = [value for value in values if value is not None]
            assert known == sorted(known)
            assert profile.dense is not None
            assert known[0] > profile.dense


def test_the_list_at_80_columns() -> None:
    lines = shown(profiles_view(shipped_profiles()))
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if "SVD-LLM (W)" in line and "66.62" in line)
    assert row.split()[-6:] == ["7.94", "13.73", "66.62", "-", "-", "-"]
    assert sum(line.startswith("[") for line in lines) == 7
    run = {("llama-7b", "svd-llm", 0.8): 8.5}
    found = shipped_profiles(lambda *key: run.get(key))
    lines = shown(profiles_view(found))
    assert "8.50" in next(line for line in lines if "66.62" in line)


def test_profiles_by_name(here: Path) -> None:
    listed = as_json("plan", "--list-profiles")["profiles"]
    assert [profile["name"] for profile in listed] == NAMES
    assert "llama-7b: huggyllama/llama-7b" in succeed("plan", "--list-profiles").stdout
    (here / "llama-7b").write_text("[model]\nname = 'mine'\n")  # a path that exists wins
    shown_mine = succeed("plan", "--profile", "llama-7b", "--show-profile").stdout
    assert 'name = "mine"' in shown_mine
    brought = succeed("plan", "--profile", "mistral-7b", "--show-profile").stdout
    assert 'name = "mistralai/Mistral-7B-v0.1"' in brought
    message, hint = fail("plan", "--profile", "lama-2-7b", code=2)
    assert message == "'lama-2-7b' is neither a file nor a shipped profile."
    assert hint == "Did you mean 'llama-2-7b'?"
    assert "Cannot read the profile" in fail("plan", "--profile", "x/llama-7b", code=2)[0]


def test_the_next_command_names_the_profile(here: Path) -> None:
    (here / "mine.toml").write_text("[model]\nname = 'demo'\n")
    told = succeed("plan", "--profile", "mine.toml", "--ratio", 0.5).stderr
    assert "Next: hisvd compress --profile mine.toml --ratio 0.5" in told
