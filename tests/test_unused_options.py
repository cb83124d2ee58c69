"""Options of methods that are not chosen: errors, unless a profile or a preset gave them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import hisvd_cli as hisvd
from hisvd_cli.utils.errors import UsageError
from tests.cli_helpers import QUICK, as_json, fail, succeed

UNUSED = {
    "plan --alpha 0.7 --allocator uniform": "--allocator hisvd",
    "plan --learning-steps 3 --allocator hisvd --allocator swift": "--allocator learned",
    "plan --depth-factor 2 --bytes-ratio 0.3": "--allocator lems",
    "plan --probe-samples 3": "--allocator asvd, lems or learned",
    "plan --input-shrinkage 0.1": "--metric fisher or held-out",
    "plan --group-size 32": "--bytes-ratio",
    "compress --oversamples 3": "--decomposer randomized",
    "compress --update-damping 0.1": "--update closed-form or propagated",
    "compress --correction alpha-blend": "--stages 2 or more",
    "compress --correction-alpha 0.1": "--stages 2 or more",
    "compress --correction-alpha 0.1 --stages 2": "--correction alpha-blend",
    "compress --correction-samples 1 --stages 2 --correction alpha-blend": "--correction "
    "gradient-step, project-to-delta or pull-subspace",
    "compress --recover-minutes 1": "--recover distill or lora",
    "compress --recover-temperature 2 --recover lora": "--recover distill",
    "compress --lora-rank 2 --recover distill": "--recover lora",
    "compress --quantize-method gptq": "--quantize int8 or int4",
    "compress --group-size 32 --quantize int8": "--quantize int4",
    "compress --damping 0.1 --quantize int4": "--quantize-method gptq",
    "compress --alpha 0.7 --preset svd-llm --preset best": "--allocator hisvd",
    "eval --turns 2": "--efficiency",
    "eval --limit 2": "--tasks",
}


@pytest.mark.parametrize("words", UNUSED)
def test_an_option_without_effect_is_an_error(words: str, here: Path) -> None:
    command, flag, *rest = words.split()
    model = ("demo",) if command == "eval" else ("--model", "demo")
    wrong, hint = fail(command, *model, flag, *rest, code=2)
    assert wrong == f"{flag} has no effect without {UNUSED[words]}."
    assert hint == f"Give {UNUSED[words]}, or leave out {flag}."
    assert list(here.iterdir()) == []


def test_a_plan_by_bytes_decides_the_rounding(here: Path) -> None:
    assert here.is_dir()
    for method in ("nearest", "gptq"):
        how = ("--bytes-ratio", 0.4, "--quantize-method", method, "--output", f"{method}.json")
        succeed("plan", *QUICK, *how)
    given = ("--no-evaluate", "--dry-run", "--damping", 0.1)
    assert as_json("compress", *QUICK, "--plan", "gptq.json", *given)["dry_run"] is True
    wrong, _ = fail("compress", *QUICK, "--plan", "nearest.json", *given, code=2)
    assert wrong == "--damping has no effect without --quantize-method gptq."


def test_in_set_and_in_convert(here: Path) -> None:
    assert here.is_dir()
    wrong, _ = fail("compress", "--model", "demo", "--set", "recover.minutes=1", code=2)
    assert wrong == "--recover-minutes has no effect without --recover distill or lora."
    form = ("convert", "there", "--to", "pt", "--output", "one.pt")
    assert "without --quantize" in fail(*form, "--group-size", 32, code=2)[0]


def test_other_sources_are_ignored(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "hisvd.toml").write_text("[plan]\nalpha = 0.7\n[recover]\nminutes = 1\n")
    monkeypatch.setenv("HISVD_COMPRESS_OVERSAMPLES", "3")
    given = ("--ratio", 0.6, "--allocator", "uniform", "--no-evaluate", "--dry-run")
    assert as_json("compress", *QUICK, *given)["dry_run"] is True


def test_an_option_of_one_of_several_methods_is_accepted(here: Path) -> None:
    assert here.is_dir()
    plans = as_json("plan", *QUICK, "--allocator", "uniform", "--allocator", "hisvd", "--alpha", 1)
    assert len(plans["plans"]) == 2
    presets = ("--preset", "svd-llm", "--preset", "hisvd", "--alpha", 0.7, "--dry-run")
    assert len(as_json("compress", *QUICK, *presets, "--no-evaluate")["cells"]) == 2
    low = ("--preset", "svd-llm", "--ratio", 0.8, "--ratio", 0.6, "--update-damping", 0.1)
    assert as_json("compress", *QUICK, *low, "--dry-run", "--no-evaluate")["cells"]


def test_the_next_command_has_no_option_of_another_method(here: Path) -> None:
    assert here.is_dir()
    chosen = ("--allocator", "uniform", "--allocator", "hisvd", "--alpha", 1)
    told = succeed("plan", *QUICK, *chosen).stderr.partition("Next: ")[2]
    assert "--allocator uniform" in told
    assert "--alpha" not in told


CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "lora": (
        lambda: hisvd.compress("demo", lora_rank=2),
        r"^'lora_rank' has no effect without recover='lora'\.",
    ),
    "minutes": (
        lambda: hisvd.compress("demo", recover_minutes=1),
        "^'recover_minutes' has no effect without recover='distill' or lora",
    ),
    "alpha": (
        lambda: hisvd.plan("demo", allocator="uniform", alpha=0.7),
        r"^'alpha' has no effect without allocator='hisvd'\.",
    ),
    "turns": (
        lambda: hisvd.evaluate("demo", turns=2),
        r"^'turns' has no effect without efficiency=True\.",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_keywords_without_effect_are_errors(case: str, here: Path) -> None:
    call, told = CALLS[case]
    with pytest.raises(UsageError, match=told):
        call()
    assert list(here.iterdir()) == []


def test_what_an_earlier_call_was_given_is_kept(here: Path) -> None:
    """A profile may set options of methods that are not chosen; the plan carries them along."""
    (here / "own.toml").write_text("[compress]\noversamples = 3\n")
    plan = hisvd.plan("demo", ratio=0.6, profile="own.toml", progress=False)
    assert plan.given["compress", "oversamples"] == 3
    made = hisvd.compress(plan, output="made", samples=8, seqlen=64, evaluate=False, progress=False)
    assert made.path == Path("made")


def test_a_plan_names_its_model(here: Path) -> None:
    succeed("plan", *QUICK, "--ratio", 0.6, "--output", "plan.json")
    small = QUICK[2:]
    succeed("compress", "--plan", "plan.json", *small, "--no-evaluate", "--output", "made")
    assert as_json("inspect", "made")["provenance"]["model"]["name"] == "demo"
    wrong, _ = fail("compress", "--plan", "nono.json")
    assert wrong == "There is no file 'nono.json'."
    assert not (here / "demo-0.6").exists()
