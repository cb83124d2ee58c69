"""The Python API: which values its functions take, and what they say of others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hisvd_cli as hisvd
from hisvd_cli.utils.errors import HisvdError, OutputError, SourceError, UsageError

Call = Callable[[], object]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> hisvd.Plan:
    """A plan of the demo model from its weights alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISVD_CACHE", str(tmp_path_factory.mktemp("values")))
        return hisvd.plan("demo", ratio=0.6, progress=False)


# What a type checker rejects stands in a list of Any.
ANY: list[Callable[..., object]] = [
    *(hisvd.calibrate, hisvd.plan, hisvd.compress, hisvd.evaluate, hisvd.inspect, hisvd.convert),
    hisvd.load,
]
calibrate, make_plan, compress, evaluate, inspect, convert, load = ANY

WRONG: dict[str, tuple[type[HisvdError], Call, str]] = {
    "form": (
        UsageError,
        lambda: convert("there", to="onnx", output="o"),
        r"^to='onnx' must be 'hf', 'pt' or 'dense'\.",
    ),
    "form in capitals": (UsageError, lambda: convert("there", to="PDF", output="o"), "to='PDF'"),
    "form of another type": (UsageError, lambda: convert("there", to=3, output="o"), "to=3 must"),
    "pair of arguments": (
        UsageError,
        lambda: convert("there", to="pt"),
        r"(?s)^'to' without 'output'\.\nAdd 'output', or leave out 'to'\.",
    ),
    "no target": (
        UsageError,
        lambda: convert("there"),
        r"(?s)\nAdd 'to' and 'output', or 'push_to_hub'\.",
    ),
    "true as a number": (
        UsageError,
        lambda: make_plan("demo", ratio=True),
        r"^ratio=True must be a number\.",
    ),
    "true in a list": (
        UsageError,
        lambda: evaluate("demo", batch_sizes=[1, True]),
        r"^batch_sizes=True must be a whole number\.",
    ),
    "list of models": (
        UsageError,
        lambda: evaluate(["a", "b"]),
        r"(?s)^'models' are separate arguments, not a list\.\nWrite hisvd\.evaluate\(\*models\)\.",
    ),
    "no model": (
        UsageError,
        lambda: make_plan(None),
        "^'source' must be a calibration or the name of a model, not None.",
    ),
    "no source": (UsageError, lambda: compress(None), "^'source' must be a plan, a calibration"),
    "number for a model": (UsageError, lambda: load(3), "not a value of type int"),
    "no checkpoint": (UsageError, lambda: convert(None, to="pt", output="o.pt"), "'checkpoint'"),
    "list to inspect": (UsageError, lambda: inspect(["a"]), "(?s)type list.*once for each"),
    "number for an output": (
        UsageError,
        lambda: compress("demo", output=3),
        r"^'output' must be a path, not a value of type int\.",
    ),
    "absent plan": (
        SourceError,
        lambda: compress("nono.json"),
        r"(?s)^There is no file 'nono\.json'\.\nCheck the path",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_named(case: str, here: Path) -> None:
    kind, call, told = WRONG[case]
    with pytest.raises(kind, match=told) as caught:
        call()
    assert "--" not in str(caught.value)
    assert "`" not in str(caught.value)
    assert list(here.iterdir()) == []


def test_a_plan_is_not_planned_again(plan: hisvd.Plan) -> None:
    with pytest.raises(UsageError, match=r"(?s)'source' is already a plan.*Plan its model"):
        make_plan(plan, ratio=0.5)
    with pytest.raises(UsageError, match=r"^'models' must be checkpoints .* of type Plan\."):
        evaluate(plan)


def test_a_plan_can_be_inspected(plan: hisvd.Plan, here: Path) -> None:
    plan.save(here / "plan.json")
    found, of_file = hisvd.inspect(plan), hisvd.inspect(here / "plan.json")
    assert found.document() == of_file.document()
    assert found.data.target == "plan of demo"


def test_saving_names_its_parameter(plan: hisvd.Plan, here: Path) -> None:
    with pytest.raises(UsageError, match=r"^path='x\.txt' does not end in \.json\."):
        plan.save("x.txt")
    (here / "other.json").write_text("{}")
    with pytest.raises(OutputError, match=r"(?s)is not a plan\.\nName another 'path'"):
        plan.save("other.json")


def test_dtypes_and_devices_of_torch_are_taken() -> None:
    model = hisvd.load("demo", dtype=torch.bfloat16, device=torch.device("cpu"), progress=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(UsageError, match=r"^dtype='int8' must be 'auto', 'float32'"):
        load("demo", dtype=torch.int8)


def test_an_unknown_keyword_has_no_far_suggestion() -> None:
    with pytest.raises(TypeError, match=r"'ratio'\. It is a setting of plan and compress\.$"):
        calibrate("demo", ratio=0.6)
    with pytest.raises(TypeError, match=r"'spam'\. help\(hisvd\.calibrate\) lists all\.$"):
        calibrate("demo", spam=1)


def test_the_help_of_a_function_speaks_of_it_alone() -> None:
    for function in (hisvd.plan, hisvd.compress):
        text = " ".join((function.__doc__ or "").split())
        assert "Rank allocation method" in text
        assert "several" not in text
        assert "`plan." not in text
        assert "--" not in text
