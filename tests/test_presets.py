"""Presets: what they hold, and how they rank among the layers of settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from hisvd_cli.allocation.methods import ALLOCATORS
from hisvd_cli.allocation.methods.hisvd import HisvdOptions
from hisvd_cli.compression.methods import DECOMPOSERS
from hisvd_cli.modeling.layers.lowrank import LAYERS
from hisvd_cli.pipelines.config.commands import Key
from hisvd_cli.pipelines.config.presets import PRESETS
from hisvd_cli.pipelines.config.resolution import resolve
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.config.settings import (
    ALLOCATOR_NAMES,
    DECOMPOSER_NAMES,
    PresetName,
    Settings,
    kind_of,
)
from hisvd_cli.utils.errors import UsageError

PRESET: Key = ("plan", "preset")

METHODS = {
    "hisvd": ("hisvd", "whitened"),
    "svd-llm": ("uniform", "whitened"),
    "svd-llm-v2": ("svdllm-v2", "whitened"),
    "rsvd-llm": ("uniform", "randomized"),
    "asvd": ("asvd", "asvd"),
    "fwsvd": ("uniform", "fwsvd"),
    "gfwsvd": ("uniform", "gfwsvd"),
    "zs-svd": ("zero-sum", "whitened"),
    "lems": ("lems", "fisher"),
    "swift-svd": ("swift", "whitened"),
    "dobi-svd": ("learned", "whitened"),
    "best": ("waterfill", "fisher"),
}
"""Preset → allocator and decomposer, as the issue that asks for them names them."""


def resolved_with(
    folder: Path,
    flags: dict[Key, object] | None = None,
    text: str = "",
    overrides: tuple[str, ...] = (),
    environ: dict[str, str] | None = None,
) -> Resolved:
    (folder / "hisvd.toml").write_text(text, encoding="utf-8")
    return resolve(flags or {}, None, overrides, environ or {}, folder)


def test_the_names_agree() -> None:
    assert list(PRESETS) == list(METHODS) == list(get_args(PresetName))


def test_the_names_of_methods_are_those_of_the_registries() -> None:
    assert list(ALLOCATOR_NAMES) == ALLOCATORS.names()
    assert list(DECOMPOSER_NAMES) == DECOMPOSERS.names()
    assert get_args(kind_of("plan", "storage")) == tuple(LAYERS)


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_is_what_it_says(name: str, tmp_path: Path) -> None:
    preset = PRESETS[name]
    Settings.model_validate({"plan": {}, **preset.settings}, strict=True)
    settings = resolved_with(tmp_path, {PRESET: name}).settings
    assert (*settings.plan.allocator, settings.compress.decomposer) == METHODS[name]
    metrics = {"best": "held-out", "lems": "fisher"}
    assert settings.plan.metric == metrics.get(name, "whitened")
    assert settings.plan.storage == ("pivoted" if name == "best" else "pair")
    assert settings.plan.min_rank_ratio == (0.3 if name == "hisvd" else 0)
    assert preset.source
    assert len(preset.about) <= 80
    assert "\n" not in preset.about


def test_hisvd_is_the_defaults(tmp_path: Path) -> None:
    settings = resolved_with(tmp_path, {PRESET: "hisvd"}).settings
    with_name = Settings().plan.model_copy(update={"preset": ["hisvd"]})
    assert settings == Settings().model_copy(update={"plan": with_name})


def test_hisvd_names_every_knob_of_its_allocator() -> None:
    """Else one that a profile sets would change what ``--preset hisvd`` means."""
    knobs = set(HisvdOptions.model_fields)
    assert knobs
    assert knobs <= set(PRESETS["hisvd"].settings["plan"])


def test_a_flag_beats_what_a_profile_sets(tmp_path: Path) -> None:
    text = '[plan]\nallocator = "uniform"\nmin_rank_ratio = 0.5\nalpha = 1\n'
    resolved = resolved_with(tmp_path, {PRESET: "best"}, text)
    plan = resolved.settings.plan
    assert (plan.allocator, plan.min_rank_ratio) == (["waterfill"], 0)
    assert resolved.value("plan", "alpha") == 1
    assert resolved.origins["plan", "allocator"] == "preset best"
    assert resolved.origins[PRESET] == "--preset"
    assert resolved.origins["plan", "alpha"] == str(tmp_path / "hisvd.toml")


@pytest.mark.parametrize(
    ("flags", "overrides"),
    [
        ({PRESET: "best", ("plan", "allocator"): ["uniform"]}, ()),
        ({PRESET: "best"}, ("plan.allocator=uniform",)),
        ({("plan", "allocator"): ["uniform"]}, ("plan.preset=best",)),
    ],
)
def test_what_is_set_beside_a_preset_wins(
    flags: dict[Key, object], overrides: tuple[str, ...], tmp_path: Path
) -> None:
    resolved = resolved_with(tmp_path, flags, overrides=overrides)
    assert resolved.settings.plan.allocator == ["uniform"]
    assert resolved.settings.plan.metric == "held-out"
    assert resolved.settings.compress.decomposer == "fisher"


def test_in_a_profile_the_order_of_keys_does_not_matter(tmp_path: Path) -> None:
    for text in (
        '[plan]\nallocator = "uniform"\npreset = "best"\n[compress]\ndecomposer = "svd"\n',
        '[compress]\ndecomposer = "svd"\n[plan]\npreset = "best"\nallocator = "uniform"\n',
    ):
        settings = resolved_with(tmp_path, text=text).settings
        assert settings.plan.allocator == ["uniform"]
        assert settings.compress.decomposer == "svd"
        assert settings.plan.metric == "held-out"


def test_the_environment_stands_between(tmp_path: Path) -> None:
    environ = {"HISVD_PLAN_PRESET": "asvd", "HISVD_COMPRESS_ASVD_ALPHA": "0.75"}
    text = '[plan]\nallocator = "uniform"\n[compress]\ndecomposer = "svd"\n'
    flags: dict[Key, object] = {("plan", "probe_samples"): "4"}
    resolved = resolved_with(tmp_path, flags, text, environ=environ)
    settings = resolved.settings
    assert settings.plan.allocator == ["asvd"]
    assert settings.plan.probe_samples == 4
    assert settings.compress.decomposer == "asvd"
    assert resolved.value("compress", "asvd_alpha") == 0.75


def test_a_preset_leaves_nothing_of_a_weaker_one(tmp_path: Path) -> None:
    resolved = resolved_with(tmp_path, {PRESET: "dobi-svd"}, '[plan]\npreset = "lems"\n')
    assert resolved.settings == resolved_with(tmp_path, {PRESET: "dobi-svd"}).settings
    assert "preset lems" not in resolved.origins.values()


def test_a_flag_leaves_the_rest_of_a_weaker_preset_in_force(tmp_path: Path) -> None:
    flags: dict[Key, object] = {("plan", "allocator"): ["uniform"]}
    settings = resolved_with(tmp_path, flags, '[plan]\npreset = "best"\n').settings
    assert settings.plan.allocator == ["uniform"]
    assert settings.compress.decomposer == "fisher"


@pytest.mark.parametrize("text", ['preset = "bset"', "preset = 3"])
def test_an_unknown_preset_is_told_with_all_other_errors(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        resolved_with(tmp_path, {("plan", "alpha"): "x"}, f"[plan]\n{text}\nallocater = 1\n")
    first, second, third = caught.value.message.splitlines()
    assert f"plan.{text} must be 'hisvd', 'svd-llm', " in first
    assert first.endswith("Did you mean 'best'?") == ("3" not in text)
    assert second.endswith("plan.allocater: no such setting. Did you mean 'allocator'?")
    assert third == "--alpha x must be a number."


def test_flags_to_paste_name_the_preset_and_not_what_it_brought(tmp_path: Path) -> None:
    flags: dict[Key, object] = {PRESET: "best", ("plan", "multiple_of"): "8"}
    resolved = resolved_with(tmp_path, flags)
    assert resolved.flags("plan", "compress") == "--preset best --multiple-of 8"


def test_flags_to_paste_beside_a_plan_name_what_the_preset_brought(tmp_path: Path) -> None:
    """With ``--plan``, ``compress`` takes no flag of planning, so no preset either."""
    resolved = resolved_with(tmp_path, {PRESET: "best"})
    assert resolved.flags("compress", expanded=True) == "--decomposer fisher"
    by_profile = resolved_with(tmp_path, text='[plan]\npreset = "best"\n')
    assert by_profile.flags("compress", expanded=True) == ""


def test_a_preset_may_say_more_at_low_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = replace(PRESETS["svd-llm"], low={"solver": "eigh"})
    monkeypatch.setitem(PRESETS, "svd-llm", preset)

    def solvers(ratios: list[float], flags: dict[Key, object] | None = None) -> list[str]:
        given = {PRESET: "svd-llm", ("plan", "ratio"): ratios, **(flags or {})}
        cells = resolved_with(tmp_path, given).cells()
        assert [cell.settings.plan.ratio for cell in cells[-len(ratios) :]] == [[r] for r in ratios]
        return [cell.settings.compress.solver for cell in cells]

    assert solvers([0.7]) == ["auto"]
    assert solvers([0.69]) == ["eigh"]
    assert solvers([0.8, 0.6, 0.4]) == ["auto", "eigh", "eigh"]
    assert solvers([0.6], {("compress", "solver"): "svd"}) == ["svd"]
    assert solvers([0.8, 0.6], {PRESET: ["svd-llm", "asvd"]}) == ["auto", "eigh", "auto", "auto"]
    several = resolved_with(tmp_path, {PRESET: "svd-llm", ("plan", "ratio"): [0.8, 0.6]})
    assert several.settings.compress.solver == "auto"  # what all ratios share
    one = resolved_with(tmp_path, {PRESET: "svd-llm", ("plan", "ratio"): [0.6]})
    assert one.origins["compress", "solver"] == "preset svd-llm"


def test_the_printed_profile_reads_back(tmp_path: Path) -> None:
    resolved = resolved_with(tmp_path, {PRESET: "lems"})
    text = resolved.toml()
    lines = text.splitlines()
    assert 'preset = "lems"  # --preset' in lines
    assert 'allocator = ["lems"]  # preset lems' in lines
    assert resolved_with(tmp_path, text=text).settings == resolved.settings


def test_several_presets_are_settings_of_their_own(tmp_path: Path) -> None:
    """Each as if it were given alone: at the place where it was given, below flags."""
    profile = '[plan]\npreset = ["best", "lems", "best"]\nratio = [0.8, 0.6]\nmultiple_of = 8\n'
    flags: dict[Key, object] = {("plan", "allocator"): ["swift"]}
    resolved = resolved_with(tmp_path, flags, profile)
    assert resolved.settings.plan.metric == "whitened"  # several bring nothing to what all share
    cells = resolved.cells()
    alone = [
        resolved_with(tmp_path, flags, profile.replace('["best", "lems", "best"]', f'"{name}"'))
        for name in ("best", "lems")
    ]
    assert [cell.settings for cell in cells] == [c.settings for a in alone for c in a.cells()]
    assert [cell.settings.plan.ratio for cell in cells] == [[0.8], [0.6]] * 2
    assert cells[0].recorded()["plan"]["preset"] == "best"
    stronger = resolved_with(tmp_path, {**flags, PRESET: ["hisvd", "asvd"]}, profile)
    assert [v.settings.plan.preset for v in stronger.variants] == [["hisvd"], ["asvd"]]
    assert stronger.variants[0].settings.plan.metric == "whitened"
    assert stronger.variants[0].settings.plan.allocator == ["swift"]
