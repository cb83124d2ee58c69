"""Methods of another, really installed package, with options of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from hisvd_cli.cli.app import app
from hisvd_cli.pipelines.config.settings import RESERVED, SECTIONS, flag_of
from tests.cli_helpers import QUICK, environment, script, two_lines

REPOSITORY = Path(__file__).parents[1]
METHODS = '''
from pydantic import Field

from hisvd_cli.allocation.budget import break_even
from hisvd_cli.allocation.methods import ALLOCATORS, Allocation, Options
from hisvd_cli.compression.methods import register_metric


class TaperOptions(Options):
    taper: float = Field(0.0, ge=0, lt=1, description="share that the last block gets less.")
    taper_name: str = Field("first", description="any text.")
    taper_end: bool = Field(True, description="whether it tapers at all.")


@ALLOCATORS.register("taper", options=TaperOptions)
def taper(spectra, budget, *, options):
    """Keep less of later blocks."""
    last = max(s.layer for s in spectra) or 1
    slope = options.taper if options.taper_end else 0
    wanted = [(1 - slope * s.layer / last) * break_even(s.shape) for s in spectra]
    ranks = budget.rounded(budget.scaled(wanted), [s.energy for s in spectra])
    return Allocation(ranks, list(ranks))


class PowerOptions(Options):
    channel_power: float = Field(1.0, ge=0, le=8, description="exponent of the mean square.")


@register_metric("channels", needs={"moments"}, options=PowerOptions)
def channels(statistics, *, options):
    """Weight each input channel by its mean square."""
    from hisvd_cli.linalg.metric import Metric

    return Metric(right=statistics.channels.mean_square.double() ** options.channel_power)
'''

SEEDED = """
from pydantic import Field

from hisvd_cli.allocation.methods import ALLOCATORS, Options


class SeedOptions(Options):
    seed: int = Field(0, description="a flag that calibration.seed has.")


@ALLOCATORS.register("seeded", options=SeedOptions)
def seeded(spectra, budget, *, options):
    raise AssertionError
"""

BROKEN = "import a_package_that_is_missing\n"


def install(folder: Path, name: str, code: str, **points: str) -> None:
    """Install a package of one module: its code, and the metadata with its entry points."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    groups = [
        f"[hisvd.{group}]\n" + "".join(f"{p} = {name}:{p}\n" for p in points_.split())
        for group, points_ in points.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages: one that works, and two that do not."""
    folder = tmp_path_factory.mktemp("site")
    install(folder, "tapering", METHODS, allocators="taper", decomposers="channels")
    install(folder, "clashing", SEEDED, allocators="seeded")
    install(folder, "breaking", BROKEN, allocators="broken", decomposers="broken_too")
    return folder


def variables(site: Path, **more: str) -> dict[str, str]:
    paths = [str(site), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "80", **more}


CHOSEN = ("--allocator", "taper", "--taper", 0.6)
POWER = ("--decomposer", "channels", "--no-evaluate", "--channel-power")
UNUSED = "[plan]\ntaper = 0.9\nsoftness = 0.5\n"
DRIVER = """
import json, sys
from tests.cli_helpers import hisvd

done = [hisvd(*words) for words in json.load(sys.stdin)]
json.dump([[each.exit_code, each.stdout, each.stderr] for each in done], sys.stdout)
"""


def python(site: Path, here: Path, code: str, given: str = "") -> str:
    """Run code in a process to which the packages are installed; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        input=given,
        cwd=here,
        env=environment(variables(site, HISVD_CACHE=str(here / "cache"))),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown(site: Path, here: Path, *words: object, **more: str) -> str:
    """Return what a command prints, run by the installed script."""
    done = script(*words, cwd=here, env=variables(site, **more), fresh=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def panels(text: str) -> dict[str, str]:
    """Return the text of each panel of a help page, without its frame."""
    found: dict[str, str] = {}
    for part in text.split("╭─ ")[1:]:
        name, _, rest = part.partition(" ─")
        found[name] = " ".join(rest.replace("│", " ").split())
    return found


def test_help_shows_methods_and_their_options(site: Path, here: Path) -> None:
    found = panels(shown(site, here, "compress", "--help-all"))
    options = found["Allocator options"]
    assert "--taper X taper: share that the last block gets less. (default 0.0)" in options
    assert "--taper-end --no-taper-end taper: whether it tapers at all. (default on)" in options
    assert "--alpha X hisvd: exponent of the rank density in stage 1. (default 0.5)" in options
    power = "--channel-power X channels: exponent of the mean square. (default 1.0)"
    assert power in found["Decomposer options"]
    assert "taper" in found["Plan"].partition("--allocator")[2].partition("--metric")[0]
    assert "broken" not in found["Plan"] + found["Compress"]
    assert "a flag that calibration.seed has" not in " ".join(found.values())


def test_names_that_options_cannot_have() -> None:
    group: Any = typer.main.get_command(app)
    settings = {flag_of(s, key) for s, model in SECTIONS.items() for key in model.model_fields}
    for command in ("plan", "compress"):
        flags = {p.opts[0] for p in group.commands[command].params if p.opts[0].startswith("--")}
        assert flags - settings <= {f"--{name}" for name in RESERVED}


def test_options_are_settings(site: Path, here: Path) -> None:
    """Flag > environment > profile > default, as for any setting."""
    (here / "hisvd.toml").write_text(
        "[plan]\ntaper = 0.1\ntaper_name = 'profile'\n[compress]\nchannel_power = 2\n"
    )
    found = json.loads(
        shown(
            site,
            here,
            *("compress", "--show-profile", "--json", "--taper", "0.3", "--no-taper-end"),
            HISVD_PLAN_TAPER="0.2",
            HISVD_PLAN_TAPER_NAME="variable",
        )
    )
    settings, origins = found["settings"], found["origins"]
    assert settings["plan"]["taper"] == 0.3
    assert settings["plan"]["taper_name"] == "variable"
    assert settings["plan"]["taper_end"] is False
    assert settings["plan"]["alpha"] == 0.5
    assert settings["compress"]["channel_power"] == 2
    assert origins["plan.taper"] == "--taper"
    assert origins["plan.taper_name"] == "HISVD_PLAN_TAPER_NAME"
    assert origins["compress.channel_power"].endswith("hisvd.toml")


def test_a_bad_value_is_an_error_like_any(site: Path, here: Path) -> None:
    (here / "hisvd.toml").write_text("[plan]\ntapr = 0.1\n[compress]\nchannel_power = '2'\n")
    done = script(
        *("compress", "--taper", "2"),
        cwd=here,
        env=variables(site, HISVD_COMPRESS_CHANNEL_POWER="9"),
        fresh=True,
    )
    assert done.returncode == 2
    message = done.stderr
    assert "plan.tapr: no such setting. Did you mean 'taper'?" in message
    assert 'channel_power = "2" must be a number, without quotes.' in message
    assert "--taper 2 must be less than 1." in message
    bad = ("compress", "--model", "demo", "--set", "compress.channel_power=9", "--taper", "x")
    (here / "hisvd.toml").unlink()
    done = script(*bad, cwd=here, env=variables(site), fresh=True)
    assert "--taper x must be a number." in done.stderr
    assert "--set compress.channel_power=9 must be less than or equal to 8." in done.stderr


RUNS: dict[str, tuple[object, ...]] = {
    "once": ("compress", *CHOSEN, *POWER, 0.5, "--output", "once"),
    "plan": ("plan", *CHOSEN, "--output", "plan.json"),
    "twice": ("compress", "--plan", "plan.json", *POWER, 0.5, "--output", "twice"),
    "other": ("compress", "--plan", "plan.json", *POWER, 0, "--output", "other"),
    "plain": ("plan", "--allocator", "uniform", "--output", "plain.json"),
    "unused": ("plan", "--allocator", "uniform", "--profile", "unused.toml", "-o", "unused.json"),
    "unchosen": ("plan", "--allocator", "uniform", "--taper", 0.9),
    "seeded": ("plan", "--allocator", "seeded"),
    "broken": ("plan", "--allocator", "broken"),
    "unknown": ("plan", "--allocator", "tapr"),
}


@dataclass(frozen=True)
class Done:
    """What all of :data:`RUNS` left."""

    folder: Path
    results: dict[str, tuple[int, str, str]]

    def document(self, path: str) -> Any:
        return json.loads((self.folder / path).read_text())

    def weights(self, name: str) -> bytes:
        return (self.folder / name / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def done(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """All of :data:`RUNS`, in one process."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "unused.toml").write_text(UNUSED)
    words = [[str(word) for word in (*run, *QUICK, "--quiet")] for run in RUNS.values()]
    answers = json.loads(python(site, folder, DRIVER, json.dumps(words)))
    return Done(folder, dict(zip(RUNS, answers, strict=True)))


def test_real_runs(done: Done) -> None:
    """In one step and, to the byte, in two."""
    for name in ("once", "plan", "twice", "other"):
        assert done.results[name][0] == 0, done.results[name]
    plan = done.document("once/plan.json")
    assert (plan["allocator"], plan["settings"]["taper"]) == ("taper", 0.6)
    ranks: dict[int, int] = {}
    for row in plan["sublayers"]:
        ranks[row["layer"]] = ranks.get(row["layer"], 0) + row["rank"]
    assert list(ranks.values()) == sorted(ranks.values(), reverse=True)
    assert ranks[0] > 1.5 * ranks[max(ranks)]
    record = done.document("once/hisvd.json")
    assert record["decomposer"] == "channels"
    assert record["settings"]["compress"]["channel_power"] == 0.5
    assert record["settings"]["plan"]["taper"] == 0.6
    assert done.weights("once") == done.weights("twice")
    assert done.weights("once") != done.weights("other")


def test_an_option_of_a_method_that_is_not_chosen(done: Done) -> None:
    """Of a profile it is recorded and has no effect, as that of a built-in method; as a flag it is
    an error."""
    plain, unused = done.document("plain.json"), done.document("unused.json")
    assert (unused["settings"]["taper"], unused["settings"]["softness"]) == (0.9, 0.5)
    assert plain["sublayers"] == unused["sublayers"]
    code, _, stderr = done.results["unchosen"]
    assert code == 2
    assert two_lines(stderr)[0] == "--taper has no effect without --allocator taper."


def test_a_method_that_cannot_be_used_is_an_error_only_when_it_is(done: Done) -> None:
    def told(name: str) -> tuple[int, str, str]:
        code, _, stderr = done.results[name]
        return (code, *two_lines(stderr))

    advice = "Update or remove the package that provides it."
    assert told("seeded") == (
        1,
        "The allocator 'seeded' cannot be loaded: the name of its option 'seed' is taken.",
        advice,
    )
    assert told("broken") == (
        1,
        "The allocator 'broken' (breaking:broken) cannot be loaded: No module named "
        "'a_package_that_is_missing'.",
        advice,
    )
    assert told("unknown") == (2, "There is no allocator 'tapr'.", "Did you mean 'taper'?")


def test_the_python_api(site: Path, here: Path) -> None:
    code = """
        import inspect, json
        import hisvd_cli as hisvd

        plan = inspect.signature(hisvd.plan).parameters["taper"]
        made = hisvd.calibrate("demo", samples=8, seqlen=64, progress=False)
        even, chosen = (
            hisvd.plan(made, allocator="taper", taper=taper, progress=False)
            for taper in (0.0, 0.6)
        )
        hisvd.compress(
            chosen, output="made", decomposer="channels", channel_power=0.5, evaluate=False,
            progress=False,
        )
        found = []
        for wrong in ({"taper": 2}, {"tapr": 0.5}):
            try:
                hisvd.plan(made, allocator="taper", progress=False, **wrong)
            except Exception as error:
                found.append(str(error))
        print(json.dumps([plan.default, even.ranks == chosen.ranks, *found]))
    """
    default, same, bad, unknown = json.loads(python(site, here, code))
    assert (default, same) == (0.0, False)
    assert bad.startswith("taper=2 must be less than 1.")
    assert unknown == "plan() got an unexpected keyword argument 'tapr'. Did you mean 'taper'?"
    plan = json.loads((here / "made" / "plan.json").read_text())
    assert plan["settings"]["taper"] == 0.6
    record = json.loads((here / "made" / "hisvd.json").read_text())
    assert record["settings"]["compress"]["channel_power"] == 0.5
