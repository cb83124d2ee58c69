"""The Python API: what it makes is what the command line makes."""

from __future__ import annotations

import inspect
import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from transformers.utils import logging

import hisvd_cli as hisvd
from hisvd_cli.allocation.plan import load_plan
from hisvd_cli.pipelines.api import keywords
from hisvd_cli.pipelines.api.keywords import DeviceName, DtypeName, PathText
from hisvd_cli.pipelines.api.names import in_python, keyword_of
from hisvd_cli.pipelines.config.commands import SETTINGS, SEVERAL, Key
from hisvd_cli.pipelines.config.settings import SECTIONS, item_of, kind_of
from hisvd_cli.utils.errors import HisvdError, OutputError, SourceError, UsageError
from tests.cli_helpers import QUICK, as_json, digests, succeed
from tests.models import save_model

Captured = pytest.CaptureFixture[str]
FUNCTIONS = ("calibrate", "plan", "compress", "evaluate", "inspect", "convert", "load")
NOTEBOOK = Path(hisvd.__file__).parent / "docs/notebook.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> hisvd.Checkpoint:
    """A checkpoint of the demo model, and beside it what the command line makes."""
    folder = tmp_path_factory.mktemp("api")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISVD_CACHE", str(folder / "cache"))
        calibration = hisvd.calibrate("demo", samples=8, seqlen=64)
        plan = hisvd.plan(calibration, ratio=0.6, preset="best")
        plan.save(folder / "plan.json")
        return hisvd.compress(plan, output=folder / "api", evaluate=False)


def weights(folder: Path) -> dict[str, str]:
    found = {n: d for n, d in digests(folder).items() if n.endswith(".safetensors")}
    assert found
    return found


def import_seconds() -> float:
    code = (
        "import sys, time; start = time.process_time(); import hisvd_cli\n"
        "print(time.process_time() - start)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'rich', 'typer'}\n"
        f"assert not heavy & set(sys.modules) and set({FUNCTIONS}) <= set(dir(hisvd_cli))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def test_the_import_is_light() -> None:
    assert min(import_seconds() for _ in range(5)) < 0.05


def test_there_are_no_other_names() -> None:
    assert {*FUNCTIONS} <= {*hisvd.__all__}
    with pytest.raises(AttributeError, match="calibrat"):
        _ = hisvd.calibrat  # type: ignore[attr-defined]


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(hisvd.__file__).parent / "py.typed").is_file()


def test_the_command_line_makes_the_same(made: hisvd.Checkpoint, tmp_path: Path) -> None:
    cache = {"HISVD_CACHE": str(tmp_path / "another")}
    chosen = ("--ratio", 0.6, "--preset", "best", "--no-evaluate", "--output", tmp_path / "cli")
    succeed("compress", *QUICK, *chosen, env=cache)
    assert weights(made.path) == weights(tmp_path / "cli")
    assert load_plan(made.path.parent / "plan.json") == load_plan(tmp_path / "cli/plan.json")
    assert made.plan == load_plan(tmp_path / "cli/plan.json")


def test_a_model_becomes_the_same_at_once(made: hisvd.Checkpoint, here: Path) -> None:
    again = hisvd.compress(
        "demo", ratio=0.6, preset="best", samples=8, seqlen=64, evaluate=False, progress=False
    )
    assert again.path == Path("demo-0.6")
    assert weights(here / "demo-0.6") == weights(made.path)


def test_a_plan_may_be_a_file(made: hisvd.Checkpoint, here: Path) -> None:
    file = made.path.parent / "plan.json"
    settings: dict[str, Any] = {"samples": 8, "seqlen": 64, "evaluate": False, "decomposer": "svd"}
    succeed("compress", *QUICK, "--plan", file, "--decomposer", "svd", "--no-evaluate", "-o", "cli")
    hisvd.compress(file, output="api", **settings)
    assert weights(here / "api") == weights(here / "cli")


def test_what_is_found_is_the_same(made: hisvd.Checkpoint) -> None:
    found = hisvd.evaluate(made, baseline="demo", windows=2)
    document = as_json("eval", made.path, "--baseline", "demo", "--windows", 2)
    assert json.loads(json.dumps(found.document())) == document
    assert found.perplexity == {str(made.path): document["results"][0]["perplexity"]}
    audit = hisvd.inspect(made)
    assert json.loads(json.dumps(audit.document())) == as_json("inspect", made.path)
    assert audit.problems == []


def test_other_forms_load(made: hisvd.Checkpoint, here: Path) -> None:
    single = hisvd.convert(made, to="pt", output="one.pt")
    succeed("convert", made.path, "--quantize", "int8", "--output", "cli")
    rounded = hisvd.convert(made, quantize="int8", output="api")
    assert weights(here / "api") == weights(here / "cli")
    parameters = {
        sum(p.numel() for p in each.load(device="cpu").parameters()) for each in (made, single)
    }
    assert len(parameters) == 1
    assert type(rounded.load(device="cpu")) is type(hisvd.load(made, device="cpu"))


@pytest.mark.slow
def test_a_checkpoint_is_recovered(made: hisvd.Checkpoint, here: Path) -> None:
    settings: dict[str, Any] = {"recover_tokens": 512, "recover_seqlen": 32, "recover_batch": 2}
    words = ("--recover-tokens", 512, "--recover-seqlen", 32, "--recover-batch", 2)
    again = hisvd.compress(made, recover="distill", output="api", **settings)
    succeed("compress", "--from", made.path, "--recover", "distill", "-o", "cli", *words)
    assert weights(again.path) == weights(here / "cli")
    assert made.path != again.path


def test_results_are_readable(made: hisvd.Checkpoint) -> None:
    plan = hisvd.Plan(load_plan(made.path / "plan.json"))
    assert repr(plan).startswith("<Plan model: demo; keep ratio: 0.6 (waterfill); kept: 60.0")
    assert "down_proj" in plan._repr_html_()
    assert "65.7" in repr(made)
    audit = hisvd.inspect(made.path / "plan.json")
    assert repr(audit).startswith("<Audit kind: plan; ")
    assert "problems" in audit._repr_html_()


def test_texts_in_html_are_escaped(made: hisvd.Checkpoint) -> None:
    data = load_plan(made.path / "plan.json")
    bad = "<script>alert('&')</script>\x1b[31m"
    clusters = [replace(each, cluster=bad) for each in data.clusters]
    plan = hisvd.Plan(replace(data, allocator=bad, clusters=clusters))
    shown = plan._repr_html_()
    assert "<script>" not in shown
    assert shown.count("&lt;script&gt;alert(&#x27;&amp;&#x27;)") == 1 + len(clusters)
    assert "\x1b" not in shown + repr(plan)
    assert "<i>" not in hisvd.Checkpoint(Path("<i>"))._repr_html_()


def test_progress_goes_to_stderr_or_nowhere(here: Path, capfd: Captured) -> None:
    assert here.is_dir()
    hisvd.calibrate("demo", samples=8, seqlen=64)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Calibrating blocks: 6/6" in err
    assert "Raise 'samples' or 'seqlen'." in err
    hisvd.calibrate("demo", samples=8, seqlen=32, progress=False)
    hisvd.evaluate("demo", seqlen=32, windows=2, progress=False)
    assert capfd.readouterr() == ("", "")


def test_libraries_are_as_they_were(here: Path) -> None:
    assert here.is_dir()
    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    with pytest.raises(UsageError):
        hisvd.evaluate(progress=False)
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before


def test_nothing_is_read_that_was_not_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "hisvd.toml").write_text("[plan]\nratio = 0.5\n", encoding="utf-8")
    monkeypatch.setenv("HISVD_PLAN_ALLOCATOR", "uniform")
    plan = hisvd.plan("demo", progress=False)
    assert (plan.ratio, plan.data.allocator) == (0.8, "hisvd")
    assert hisvd.plan("demo", profile="hisvd.toml", progress=False).ratio == 0.5


def test_an_unknown_keyword_names_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"plan\(\) got .* 'ratoi'\. Did you mean 'ratio'\?"):
        hisvd.plan("demo", ratoi=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="Did you mean 'recover_tokens'"):
        hisvd.compress("demo", recover_token=1)  # type: ignore[call-arg]


WRONG: dict[str, tuple[type[HisvdError], Callable[[], object], str]] = {
    "value": (UsageError, lambda: hisvd.plan("demo", ratio=1.5), "^ratio=1.5 must be above 0"),
    "choice": (
        UsageError,
        lambda: hisvd.plan("demo", preset="bset"),  # type: ignore[arg-type]
        r"(?s)^preset='bset' must be .* 'best'\?\nhelp\(hisvd.plan\) lists",
    ),
    "several": (
        UsageError,
        lambda: hisvd.plan("demo", ratio=[0.5, 0.6]),  # type: ignore[arg-type]
        "^'ratio' has 2 values: 0.5, 0.6",
    ),
    "flag": (
        UsageError,
        lambda: hisvd.convert("there", to="pt"),
        "(?s)^'to' without 'output'.\nAdd 'output', or leave out 'to'",
    ),
    "model": (UsageError, lambda: hisvd.calibrate(""), "(?s)No model is named.\nGive 'model' with"),
    "absent": (SourceError, lambda: hisvd.convert("x", to="pt", output="o.pt"), "no checkpoint"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_keywords(case: str, here: Path) -> None:
    kind, call, told = WRONG[case]
    with pytest.raises(kind, match=told) as caught:
        call()
    assert "--" not in str(caught.value)
    assert list(here.iterdir()) == []


def test_nothing_is_overwritten(made: hisvd.Checkpoint) -> None:
    plan = hisvd.Plan(load_plan(made.path / "plan.json"), {("model", "name"): "demo"})
    with pytest.raises(OutputError, match="Pass overwrite=True, or name another 'output'"):
        hisvd.compress(plan, output=made.path, samples=8, seqlen=64)
    with pytest.raises(UsageError, match=r"^'storage' cannot change the given plan\."):
        hisvd.compress(plan, output="o", storage="pair")


def test_one_of_several_models_may_fail(here: Path, capfd: Captured) -> None:
    save_model("llama", here / "tiny")
    found = hisvd.evaluate("demo", "absent", seqlen=32, windows=2)
    assert [each.model for each in found.failures] == ["absent"]
    assert "absent failed" in repr(found)
    assert "Warning: absent:" in capfd.readouterr().err


def test_messages_about_commands_stay() -> None:
    told = "Give --model and --no-evaluate. Run: hisvd calibrate --model x"
    assert in_python(told) == "Give 'model' and evaluate=False. Run: hisvd calibrate --model x"
    assert in_python("a--model --unknown") == "a--model --unknown"


def accepted(key: Key, is_path: bool) -> object:
    """Return the type of a keyword, from its setting."""
    kind, default = kind_of(*key), SECTIONS[key[0]].model_fields[key[1]].default
    item: Any = PathText if is_path else item_of(kind)
    item = {("model", "device"): DeviceName, ("model", "dtype"): DtypeName}.get(key, item)
    if get_origin(kind) is list and key not in SEVERAL:
        item = item | Sequence[item]
    return item | None if default is None or key == ("plan", "preset") else item


@pytest.mark.parametrize("name", FUNCTIONS)
def test_keywords_are_the_settings(name: str) -> None:
    hints = get_type_hints(getattr(keywords, f"{name.capitalize()}Keywords"))
    keys = {keyword_of(key): key for key in SETTINGS[name]}
    own = {"model"} if name in ("calibrate", "plan") else set()
    assert hints.keys() == keys.keys() - own
    for keyword, hint in hints.items():
        is_path = "PathLike" in str(hint)
        assert not is_path or item_of(kind_of(*keys[keyword])) is str
        assert set(get_args(hint)) == set(get_args(accepted(keys[keyword], is_path))), keyword
    shown = inspect.signature(getattr(hisvd, name)).parameters
    assert [keyword for keyword in keys if keyword in hints] == list(shown)[-len(hints) :]
    if "dtype" in hints:
        assert shown["dtype"].default == "auto"


@pytest.mark.slow
def test_the_notebook_runs(here: Path) -> None:
    names = runpy.run_path(str(NOTEBOOK))
    assert names["evaluation"].baseline is not None
    assert (here / "demo-0.6-dense/model.safetensors").is_file()
