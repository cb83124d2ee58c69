"""Nothing that a folder holds runs, or chooses settings, without the user asking for it."""

from __future__ import annotations

import os
from pathlib import Path

import jinja2
import pytest

from hisvd_cli.modeling.layers.transformers_plugin import AUTO_MAP
from hisvd_cli.modeling.sources.source import Source, names_own_loader
from hisvd_cli.pipelines.config.profile_search import search_profile
from hisvd_cli.pipelines.config.resolution import resolve
from hisvd_cli.pipelines.config.settings import SECTIONS, consent_of
from tests.cli_helpers import as_json, fail, script, succeed, two_lines
from tests.conftest import MakeModel
from tests.models import edit_json
from tests.test_source import copy_of

SHORT = ("--samples", 8, "--seqlen", 64, "--dataset", "demo")
EVALUATED = ("--dataset", "demo", "--windows", 2, "--seqlen", 32)
TRAINED = ("--recover-dataset", "demo", "--recover-seqlen", 32, "--recover-samples", 8)
TASK = """
task: endings
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: !function lure.text
doc_to_choice: [a, b]
doc_to_target: 0
"""


def lure(folder: Path, proof: Path) -> Path:
    """Write Python code that leaves a proof of having run."""
    code = f"open({str(proof)!r}, 'w')\n"
    code += "from transformers import LlamaConfig, LlamaForCausalLM\n"
    # Subclasses: transformers marks what an auto_map names as code to be saved with the model.
    code += "class Config(LlamaConfig):\n    pass\n"
    code += "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    (folder / "lure.py").write_text(code + "def text(row):\n    return ''\n")
    return folder


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    """What exists once foreign code has run."""
    return tmp_path / "ran"


@pytest.fixture
def luring(tiny_model: MakeModel, tmp_path: Path, proof: Path) -> Path:
    """A model whose folder holds code, and a profile that asks for it to be run."""
    folder = lure(copy_of(tiny_model("llama"), tmp_path / "model"), proof)
    auto_map = {"AutoConfig": "lure.Config", "AutoModelForCausalLM": "lure.Model"}
    edit_json(folder / "config.json", auto_map=auto_map, model_type="lure")
    (folder / "hisvd.toml").write_text("[model]\ntrust_remote_code = true\n")
    return folder


# Profiles


@pytest.mark.parametrize("where", ["model", "."])
def test_code_of_a_model_does_not_run_by_a_found_profile(
    luring: Path, proof: Path, where: str
) -> None:
    (luring / "hisvd.toml").rename(luring.parent / where / "hisvd.toml")
    done = script("inspect", ".", cwd=luring)
    assert not proof.exists()
    message, hint = two_lines(done.stderr)
    assert (done.returncode, done.stdout) == (2, "")
    profile = (luring.parent / where / "hisvd.toml").resolve()
    assert message.startswith(f"{profile}: model.trust_remote_code = true runs the Python code")
    assert "which requires a flag, an environment variable or --profile" in message
    assert f"--profile {profile}" in hint


@pytest.mark.parametrize(
    ("words", "env"),
    [
        (["--trust-remote-code"], {}),
        (["--set", "model.trust_remote_code=true"], {}),
        (["--profile", "asked.toml"], {}),
        ([], {"HISVD_MODEL_TRUST_REMOTE_CODE": "1"}),
    ],
)
def test_code_of_a_model_runs_where_it_is_asked_for(
    luring: Path, proof: Path, words: list[str], env: dict[str, str]
) -> None:
    (luring / "hisvd.toml").rename(luring / "asked.toml")
    done = script("inspect", ".", *words, cwd=luring, env=env)
    assert done.returncode == 0, done.stderr
    assert proof.exists()


def test_code_of_task_files_does_not_run_by_a_found_profile(here: Path, proof: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    (lure(here, proof) / "endings.yaml").write_text(TASK)
    (here / "questions.jsonl").write_text('{"a": 1}\n')
    (here / "hisvd.toml").write_text('[eval]\ntasks = "endings"\ntask_path = "."\n')
    command = ("eval", "demo", "--windows", 1, "--seqlen", 32)
    message, _ = fail(*command, code=2)
    assert 'eval.task_path = "." runs the Python code that task files name' in message
    assert not proof.exists()
    succeed(*command, "--profile", "hisvd.toml")
    assert proof.exists()


@pytest.mark.slow
def test_a_task_is_no_file_that_lies_here(here: Path, proof: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    (lure(here, proof) / "endings.yaml").write_text(TASK)
    names = ["./endings.yaml", "endings.yaml", "endings", "lure.py"]
    (here / "hisvd.toml").write_text(f"[eval]\ntasks = {names}\n")
    message, _ = fail("eval", "demo", "--windows", 1, "--seqlen", 32, code=2)
    assert "has no task './endings.yaml'" in message
    from lm_eval.tasks import TaskManager

    assert not set(names) & set(TaskManager().all_tasks)
    assert not proof.exists()


def test_what_runs_code_or_sends_data_says_so_where_it_is_declared() -> None:
    keys = [(section, key) for section, model in SECTIONS.items() for key in model.model_fields]
    asked = {key for key in keys if consent_of(*key)}
    assert asked == {("model", "trust_remote_code"), ("eval", "task_path")}
    for section, key in set(keys) - asked:  # a new setting of this kind is not forgotten
        words = set(key.split("_"))
        assert not words & {"push", "hub", "upload", "trust", "remote", "code"}, (section, key)


def test_a_default_may_stand_in_a_found_profile(here: Path) -> None:
    (here / "hisvd.toml").write_text(succeed("plan", "--show-profile").stdout)
    shown = succeed("plan", "--show-profile").stdout
    assert "trust_remote_code = false" in shown


def test_a_flag_does_not_excuse_a_found_profile(luring: Path, proof: Path) -> None:
    done = script("inspect", ".", "--trust-remote-code", cwd=luring)
    assert done.returncode == 2
    assert not proof.exists()


# Checkpoints


@pytest.fixture(scope="module")
def low(tiny_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model."""
    root = tmp_path_factory.mktemp("trust")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISVD_CACHE", str(root / "cache"))
        made = ("--ratio", 0.6, *SHORT, "--set", "compress.evaluate=false")
        succeed("compress", "--model", tiny_model("llama"), *made, "--output", root / "low")
    return root / "low"


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "low", *EVALUATED, "--stream", "off"],
        ["eval", "low", *EVALUATED, "--stream", "on"],
        ["inspect", "low"],
        ["compress", "--from", "low", "--recover", "distill", "--recover-tokens", 200, *TRAINED],
    ],
)
@pytest.mark.parametrize("tokenizer", [False, True])
def test_a_checkpoint_runs_no_loader_of_its_own(
    low: Path, here: Path, proof: Path, words: list[object], tokenizer: bool
) -> None:
    folder = lure(copy_of(low, here / "low"), proof)
    (folder / "lure.py").rename(folder / "modeling_hisvd.py")
    if tokenizer:
        auto_map = {"AutoTokenizer": [None, "modeling_hisvd.Tokenizer"]}
        edit_json(folder / "tokenizer_config.json", auto_map=auto_map)
    succeed(*words, "--trust-remote-code")
    assert not proof.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "../model", *EVALUATED],
        ["compress", "--model", "../model", "--ratio", 0.6, *SHORT, "--output", "out"],
    ],
)
def test_a_model_runs_its_own_code_where_it_is_asked_for(
    luring: Path, proof: Path, here: Path, words: list[object]
) -> None:
    (luring / "hisvd.toml").unlink()
    assert here.parent == luring.parent
    message, hint = fail(*words)
    assert "transformers cannot read the config" in message
    assert "--trust-remote-code" in hint
    assert not proof.exists()
    succeed(*words, "--trust-remote-code", "--set", "compress.evaluate=false")
    assert proof.exists()


@pytest.mark.usefixtures("here")
def test_code_of_a_model_travels_only_where_it_is_asked_for(
    tiny_model: MakeModel, tmp_path: Path, proof: Path
) -> None:
    folder = lure(copy_of(tiny_model("llama"), tmp_path / "model"), proof)
    (folder / "lure.py").write_text((folder / "lure.py").read_text() + "from .other import x\n")
    for name in ("other.py", "unused.py"):
        (folder / name).write_text("x = 1\n")
    auto_map = {"AutoConfig": "lure.Config", "AutoModelForCausalLM": "lure.Model"}
    edit_json(folder / "config.json", auto_map=auto_map)  # of a type that transformers knows
    made = ("compress", "--model", folder, "--ratio", 0.6, *SHORT, "--no-evaluate")
    loader = {
        "modeling_hisvd.py",
        "lowrank.py",
        "quantized.py",
        "peft_support.py",
        "import_hooks.py",
        "factored.py",
        "experts.py",
        "replacement.py",
        "conversions.py",
    }
    succeed(*made, "--output", "plain")
    assert {path.name for path in Path("plain").glob("*.py")} == loader
    assert not proof.exists()
    succeed(*made, "--trust-remote-code", "--output", "own")
    assert proof.exists()
    assert {path.name for path in Path("own").glob("*.py")} == {"lure.py", "other.py"}
    assert "base model's code" in Path("own/README.md").read_text()
    own = as_json("eval", "own", *EVALUATED, "--trust-remote-code")["results"][0]
    assert own == as_json("eval", "plain", *EVALUATED)["results"][0]
    succeed("inspect", "own", "--trust-remote-code")
    for words in (["--to", "hf"], ["--to", "dense"], ["--to", "pt"], ["--quantize", "int8"]):
        output = "x.pt" if "pt" in words else "x"
        message, _ = fail("convert", "own", *words, "--output", output)
        assert "neither converts nor uploads" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "evil/kernel"},
        {"attn_implementation": {"text_config": "evil/kernel@v1:x"}},
        {"text_config": {"_attn_implementation": "evil/kernel"}},
    ],
)
def test_a_config_names_no_code_of_the_hub(
    tiny_model: MakeModel, tmp_path: Path, changes: dict[str, object]
) -> None:
    folder = copy_of(tiny_model("llama"), tmp_path / "model")
    edit_json(folder / "config.json", **changes)
    for words in (["inspect", folder], ["eval", folder, *EVALUATED]):
        message, hint = fail(*words)
        assert "names Hub code as" in message
        assert "Remove" in hint


def test_the_loader_is_known_by_the_name_that_it_is_written_under() -> None:
    assert names_own_loader({"auto_map": AUTO_MAP})
    assert names_own_loader({"auto_map": {"AutoModel": "me/model--modeling_hisvd.X"}})
    assert not names_own_loader({"auto_map": {"AutoModel": "me/modeling_hisvd--modeling_x.X"}})
    assert not names_own_loader({})
    assert not names_own_loader({"auto_map": None})


# Other ways to run something


def test_a_chat_template_runs_nothing(low: Path, here: Path, proof: Path) -> None:
    folder = copy_of(low, here / "low")
    opener = "''.__class__.__mro__[1].__subclasses__()"
    run = "{% for c in " + opener + " %}{% if c.__name__ == 'Popen' %}"
    run += "{{ c(['touch', '" + str(proof) + "']) }}{% endif %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(run)
    succeed("eval", folder, *EVALUATED, "--fresh")
    tokenizer = Source(str(folder), folder).tokenizer
    assert tokenizer.chat_template == run
    with pytest.raises(jinja2.exceptions.SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert not proof.exists()


@pytest.mark.parametrize("name", ["own/set", "own/set:part", "./own/set"])
def test_a_folder_here_is_no_data_set(here: Path, proof: Path, name: str) -> None:
    folder = here / "own" / "set"
    folder.mkdir(parents=True)
    (folder / "set.py").write_text(f"open({str(proof)!r}, 'w')\n")
    message, _ = fail("eval", "demo", "--dataset", name, "--windows", 1, "--seqlen", 32)
    assert "only a folder" in message
    message, _ = fail("calibrate", "--model", "demo", "--dataset", name)
    assert "only a folder" in message
    assert not proof.exists()


# The search for a profile


def write_profile(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "hisvd.toml"
    path.write_text("[plan]\nalpha = 0.75\n")
    return path.resolve()


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a path another user's: really so for root, who may; else the user is another one."""
    if os.getuid() == 0:
        os.chown(path, 54321, -1, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 54321)


def test_the_search_ends_at_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    inner = home / "work" / "project"
    inner.mkdir(parents=True)
    above = write_profile(tmp_path)
    assert search_profile(inner).profile == above
    monkeypatch.setenv("HOME", str(home))
    assert search_profile(inner).profile is None
    assert search_profile(home).profile is None
    own = write_profile(home)
    assert search_profile(inner).profile == own


def test_the_search_ends_at_the_boundary_of_a_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted = tmp_path / "mounted"
    inner = mounted / "project"
    inner.mkdir(parents=True)
    above = write_profile(tmp_path)
    assert search_profile(inner).profile == above
    stat = Path.stat

    def mount(path: Path, **options: bool) -> os.stat_result:
        found = list(stat(path, **options))
        if path == mounted or mounted in path.parents:
            found[2] += 1  # the device
        return os.stat_result(found)

    monkeypatch.setattr(Path, "stat", mount)
    assert search_profile(inner).profile is None
    own = write_profile(mounted)
    assert search_profile(inner).profile == own


@pytest.mark.parametrize("owned", ["folder", "profile", "link"])
def test_the_search_ends_at_what_another_user_owns(
    here: Path, monkeypatch: pytest.MonkeyPatch, owned: str
) -> None:
    shared = here / "shared"
    inner = shared / "project"
    inner.mkdir(parents=True)
    write_profile(here)
    foreign = write_profile(shared)
    if owned == "link":
        foreign.rename(shared / "real.toml")
        foreign.symlink_to("real.toml")
    give_away(shared if owned == "folder" else foreign, monkeypatch)
    found = search_profile(inner)
    assert (found.profile, found.foreign) == (None, foreign)
    monkeypatch.chdir(inner)
    done = succeed("plan", "--show-profile")
    assert "alpha = 0.5 " in done.stdout
    assert f"{foreign} is ignored" in done.stderr
    assert f"--profile {foreign}" in done.stderr
    asked = succeed("plan", "--show-profile", "--profile", foreign)
    assert "alpha = 0.75 " in asked.stdout
    assert asked.stderr == ""


def test_the_search_does_not_go_on_above_a_folder_of_another_user(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = here / "shared"
    shared.mkdir()
    write_profile(here)
    give_away(shared, monkeypatch)
    found = search_profile(shared)
    assert (found.profile, found.foreign) == (None, None)


def test_the_search_needs_no_numbers_of_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_profile(tmp_path)
    monkeypatch.delattr(os, "getuid")  # as on Windows
    assert search_profile(tmp_path).profile == path


def test_the_profile_in_use_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert succeed("plan", "--show-profile").stdout.startswith("# profile: none\n")
    assert as_json("plan", "--show-profile")["profile"] is None
    path = write_profile(here)
    assert succeed("plan", "--show-profile").stdout.startswith(f"# profile: {path}\n")
    assert as_json("plan", "--show-profile")["profile"] == str(path)
    assert f"Profile: {path}\n" in succeed("plan", "--show-profile", "--verbose").stderr
    assert "Profile" not in succeed("plan", "--show-profile").stderr
    assert resolve({}, path, environ={}).in_use == str(path)
