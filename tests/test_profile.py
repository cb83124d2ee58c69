"""Settings: precedence, strictness, all errors at once, and the profile that is printed back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import tomli

from hisvd_cli.pipelines.config.commands import Key
from hisvd_cli.pipelines.config.profile_search import search_profile
from hisvd_cli.pipelines.config.resolution import resolve
from hisvd_cli.pipelines.config.settings import SECTIONS, Settings
from hisvd_cli.utils.errors import UsageError


def write(folder: Path, text: str) -> Path:
    path = folder / "hisvd.toml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(
    folder: Path,
    text: str = "",
    flags: Mapping[Key, object] | None = None,
    overrides: tuple[str, ...] = (),
    environ: Mapping[str, str] | None = None,
) -> list[str]:
    """Return the lines of the error that settings give, without the profile's path."""
    path = write(folder, text)
    with pytest.raises(UsageError) as caught:
        resolve(flags or {}, None, overrides, environ or {}, folder)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    return [line.replace(f"{path}: ", "") for line in caught.value.message.splitlines()]


def test_defaults(tmp_path: Path) -> None:
    resolved = resolve({}, environ={}, start=tmp_path)
    assert resolved.settings == Settings()
    assert resolved.origins == {}


def test_precedence(tmp_path: Path) -> None:
    path = write(tmp_path, "[plan]\nalpha = 1\nlwe_strength = 1\nratio = 0.9\nmultiple_of = 8\n")
    environ = {"HISVD_PLAN_ALPHA": "2", "HISVD_PLAN_LWE_STRENGTH": "2"}
    resolved = resolve({("plan", "alpha"): 3.0}, environ=environ, start=tmp_path)
    plan = resolved.settings.plan.model_dump()
    assert (plan["alpha"], plan["lwe_strength"]) == (3, 2)
    assert (plan["ratio"], plan["multiple_of"]) == ([0.9], 8)
    assert resolved.origins == {
        ("plan", "alpha"): "--alpha",
        ("plan", "lwe_strength"): "HISVD_PLAN_LWE_STRENGTH",
        ("plan", "ratio"): str(path),
        ("plan", "multiple_of"): str(path),
    }


def test_a_flag_that_was_not_given_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path, "[plan]\nalpha = 1\n")
    resolved = resolve({("plan", "alpha"): None}, environ={}, start=tmp_path)
    assert resolved.value("plan", "alpha") == 1


def test_the_nearest_profile_upward(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    outer = write(tmp_path, "[plan]\nalpha = 1\n")
    assert search_profile(inner).profile == outer
    near = write(tmp_path / "a", "[plan]\nalpha = 2\n")
    assert search_profile(inner).profile == near
    named = tmp_path / "other.toml"
    named.write_text("[plan]\nalpha = 3\n")
    assert resolve({}, named, environ={}, start=inner).value("plan", "alpha") == 3
    (near.parent / "b" / "hisvd.toml").mkdir()  # a folder of that name is no profile
    assert search_profile(inner).profile == near


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("plan.alpha=0.25", ("plan", "alpha"), 0.25),
        ("plan.ratio=[0.5, 0.6]", ("plan", "ratio"), [0.5, 0.6]),
        ("plan.ratio=0.5", ("plan", "ratio"), [0.5]),
        ("model.revision=1234567", ("model", "revision"), "1234567"),
        ("model.revision=true", ("model", "revision"), "true"),
        ("model.name='a b'", ("model", "name"), "a b"),
        ("model.name=org/name", ("model", "name"), "org/name"),
        ("compress.evaluate=false", ("compress", "evaluate"), False),
        (" eval.dataset = c4 ", ("eval", "dataset"), ["c4"]),
        ("model.name=a=b", ("model", "name"), "a=b"),
    ],
)
def test_overrides(override: str, key: Key, value: object, tmp_path: Path) -> None:
    resolved = resolve({}, overrides=[override], environ={}, start=tmp_path)
    assert resolved.value(*key) == value
    assert resolved.origins == {key: f"--set {key[0]}.{key[1]}"}
    assert resolved.is_flag(*key)


def test_the_environment(tmp_path: Path) -> None:
    environ = {
        "HISVD_PLAN_RATIO": "0.8, 0.6",
        "HISVD_PLAN_INCLUDE": "q_proj,*.mlp.*",
        "HISVD_COMPRESS_EVALUATE": "no",
        "HISVD_CALIBRATION_SEED": "7",
        "HISVD_MODEL_REVISION": "",  # empty: as if it were not set
        "HISVD_CACHE": "/tmp/x",
        "HISVD_DEBUG": "1",
        "HISVD_SMOLLM2": "somebody else's",
    }
    resolved = resolve({}, environ=environ, start=tmp_path)
    assert resolved.settings.plan.ratio == [0.8, 0.6]
    assert resolved.settings.plan.include == ["q_proj", "*.mlp.*"]
    assert resolved.settings.compress.evaluate is False
    assert resolved.settings.calibration.seed == 7
    assert resolved.settings.model.revision is None


@pytest.mark.parametrize(
    ("variable", "meant"),
    [("HISVD_PLAN_ALFA", "HISVD_PLAN_ALPHA"), ("HISVD_MODEL", "HISVD_MODEL_NAME")],
)
def test_a_misspelt_variable(variable: str, meant: str, tmp_path: Path) -> None:
    assert problems(tmp_path, environ={variable: "1"}) == [
        f"{variable}: no such setting. Did you mean '{meant}'?"
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[plan]\nalpha = "1"', 'plan.alpha = "1" must be a number, without quotes.'),
        ("[plan]\nmultiple_of = 1.5", "plan.multiple_of = 1.5 must be a whole number."),
        ("[plan]\nmultiple_of = true", "plan.multiple_of = true must be a whole number."),
        ("[plan]\nallocator = []", "plan.allocator = [] must name at least one."),
        ("[plan]\nprobe_ratio = 0", "plan.probe_ratio = 0 must be greater than 0."),
        (
            "[plan]\nsensitivity_ratios = 1.5",
            "plan.sensitivity_ratios = 1.5 must be less than or equal to 1.",
        ),
        ("[plan]\nratio = []", "plan.ratio = [] must name at least one."),
        ("[plan]\nratio = [0.5, 2]", "plan.ratio = 2 must be above 0 and at most 1."),
        ("[plan]\nratio = {a = 1}", "plan.ratio = {a = 1} must be a number."),
        ("[plan]\nalpha = nan", "plan.alpha = nan must be a finite number."),
        ("[plan]\nalpha = -1", "plan.alpha = -1 must be greater than or equal to 0."),
        ("[plan]\nalfa = 1", "plan.alfa: no such setting. Did you mean 'alpha'?"),
        ("[plan]\nlwe = 1", "plan.lwe: no such setting. Did you mean 'lwe_strength'?"),
        ("[plna]\nalpha = 1", "plna: no such setting. Did you mean 'plan'?"),
        ("alpha = 1", "alpha: no such setting. It belongs to [plan]."),
        (
            "seqlen = 1",
            "seqlen: no such setting. It belongs to [calibration] or [recover] or [eval].",
        ),
        ("plan = 3", "plan = 3 is not a table: write [plan] above its keys."),
        ("[model]\nname = 3", "model.name = 3 must be text."),
        (
            '[model]\ntrust_remote_code = "yes"',
            'model.trust_remote_code = "yes" must be true or false, without quotes.',
        ),
        (
            '[plan]\nmodulation = "linar"',
            "plan.modulation = \"linar\" must be 'logarithmic', 'power', 'exponential' or "
            "'linear'. Did you mean 'linear'?",
        ),
    ],
)
def test_what_a_profile_may_not_hold(text: str, line: str, tmp_path: Path) -> None:
    assert problems(tmp_path, text) == [line]


def test_a_bad_profile_is_an_error_even_where_a_flag_wins(tmp_path: Path) -> None:
    flags = {("plan", "alpha"): "2"}
    assert problems(tmp_path, '[plan]\nalpha = "1"', flags) == [
        'plan.alpha = "1" must be a number, without quotes.'
    ]


def test_all_layers_are_checked_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        '[plan]\nalpha = "1"\nalfa = 2\n',
        {("calibration", "samples"): "0", ("plan", "ratio"): ["0.5", "60"]},
        ("plan.moo=1", "modulation=linear", "plan.spectrum"),
        {"HISVD_CALIBRATION_SEED": "one"},
    )
    assert found == [
        'plan.alpha = "1" must be a number, without quotes.',
        "plan.alfa: no such setting. Did you mean 'alpha'?",
        "--set plan.moo=1: no such setting. Did you mean 'plan.modulation'?",
        "--set modulation=linear: no such setting. Did you mean 'plan.modulation'?",
        "--set plan.spectrum: no such setting. Write section.key=value.",
        "--samples 0 must be greater than or equal to 1.",
        "HISVD_CALIBRATION_SEED=one must be a whole number.",
        "--ratio 60 must be above 0 and at most 1.",
    ]


def test_a_profile_that_cannot_be_read(tmp_path: Path) -> None:
    for text, told in ((b"[plan\n", "is not valid TOML"), (b"\xff", "is not valid TOML")):
        (tmp_path / "hisvd.toml").write_bytes(text)
        with pytest.raises(UsageError, match=told) as caught:
            resolve({}, environ={}, start=tmp_path)
        assert "\n" not in caught.value.message
    with pytest.raises(UsageError, match="No such file"):
        resolve({}, tmp_path / "absent.toml", environ={}, start=tmp_path)


def test_a_profile_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "hisvd.toml").write_text("[plan]\nratio = [0.5]\n", encoding="utf-8-sig")
    assert resolve({}, environ={}, start=tmp_path).settings.plan.ratio == [0.5]


def test_the_profile_is_printed_as_one_that_reads_back(tmp_path: Path) -> None:
    flags: dict[Key, object] = {
        ("model", "name"): 'a "quoted"\nname',
        ("model", "revision"): "v1",
        ("plan", "ratio"): ["0.8", "0.6"],
        ("plan", "include"): ["a b", "[x]", "# no comment"],
        ("compress", "evaluate"): True,
        ("eval", "dataset"): [],
    }
    environ = {"HISVD_PLAN_ALPHA": "0.1", "HISVD_CALIBRATION_PATH": "/tmp/é"}
    resolved = resolve(flags, environ=environ, start=tmp_path)
    text = resolved.toml()
    assert Settings.model_validate(tomli.loads(text), strict=True) == resolved.settings
    lines = text.splitlines()
    assert 'revision = "v1"  # --revision' in lines
    assert "alpha = 0.1  # HISVD_PLAN_ALPHA" in lines
    assert "seed = 0  # default" in lines
    assert "# seqlen is unset  # default" in lines
    for section, model in SECTIONS.items():
        assert f"[{section}]" in lines
        for key in model.model_fields:
            assert any(line.removeprefix("# ").startswith(f"{key} ") for line in lines)
    again = tmp_path / "again.toml"
    again.write_text(text, encoding="utf-8")
    assert resolve({}, again, environ={}, start=tmp_path).settings == resolved.settings


def test_settings_as_data(tmp_path: Path) -> None:
    resolved = resolve({("plan", "alpha"): "1"}, environ={}, start=tmp_path)
    document = resolved.document()
    assert document["origins"] == {"plan.alpha": "--alpha"}
    assert Settings.model_validate(document["settings"]) == resolved.settings


def test_what_artifacts_record(tmp_path: Path) -> None:
    one = resolve({("calibration", "path"): "x"}, environ={}, start=tmp_path)
    other = resolve(
        {("eval", "windows"): 3, ("compress", "evaluate"): True}, environ={}, start=tmp_path
    )
    assert one.recorded() == other.recorded()  # neither changes a checkpoint
    assert set(one.recorded()) == {
        *("model", "calibration", "plan", "compress", "recover", "quantize"),
    }
    assert set(one.recorded("model")) == {"model"}


def test_flags_to_paste(tmp_path: Path) -> None:
    write(tmp_path, "[plan]\nalpha = 1\n")
    flags: dict[Key, object] = {
        ("model", "name"): "my model",
        ("model", "trust_remote_code"): True,
        ("plan", "ratio"): ["0.6666667", "0.5"],
    }
    resolved = resolve(flags, None, ["compress.evaluate=false"], {}, tmp_path)
    assert resolved.flags("model") == "--model 'my model' --trust-remote-code"
    assert resolved.flags("plan", "compress") == (
        "--ratio 0.6666667 --ratio 0.5 --set compress.evaluate=false"
    )
    assert resolved.flags("plan", without=[("plan", "ratio")]) == ""
