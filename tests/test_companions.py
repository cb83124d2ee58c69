"""What travels beside the weights: known files of the model, and nothing else that lies there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from hisvd_cli.inspection.pt_files import load_pt
from hisvd_cli.modeling.checkpoints.checkpoint import open_checkpoint
from hisvd_cli.modeling.sources.companions import companions, is_companion
from hisvd_cli.utils.errors import SourceError
from tests.cli_helpers import fail, hisvd, succeed
from tests.conftest import MakeModel
from tests.fake_hub import FakeHub
from tests.models import names
from tests.test_source import copy_of

SECRET = "ssh-secret"
PLANTED = (".bashrc", ".env", "hisvd.toml", "evil.py", "tokenizer.py", "token", "LICENSE.py")
WRITTEN = {"README.md", "config.json", "hisvd.json", "model.safetensors", "plan.json"}
LOADER = {
    *("modeling_hisvd.py", "lowrank.py", "quantized.py", "peft_support.py", "import_hooks.py"),
    *("factored.py", "experts.py", "replacement.py", "conversions.py"),
}
TRAVELS = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "NOTICE", "LICENCE"}
QUICK = ("--samples", 8, "--seqlen", 64, "--dataset", "demo", "--set", "compress.evaluate=false")

pytestmark = pytest.mark.usefixtures("here")


def plant(folder: Path) -> Path:
    """Put files that must not travel beside a model, a link to a secret, and a link that may."""
    for name in PLANTED:
        (folder / name).write_text("planted")
    (folder.parent / "id_rsa").write_text(SECRET)
    for name in ("LICENSE", "vocab.txt"):
        (folder / name).symlink_to("../id_rsa")
    (folder / "terms.txt").write_text("free")
    for link, target in (("NOTICE", "terms.txt"), ("LICENCE", "NOTICE")):
        (folder / link).unlink(missing_ok=True)
        (folder / link).symlink_to(target)
    return folder


def lies_there(folder: Path) -> set[str]:
    """Return the names in a folder; fail where the secret is in any file."""
    for path in folder.rglob("*"):
        assert SECRET.encode() not in path.read_bytes(), path
    return set(names(folder))


@pytest.fixture(scope="module")
def made(tiny_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, compressed; both with what must not travel beside them."""
    root = tmp_path_factory.mktemp("companions")
    model = plant(copy_of(tiny_model("llama"), root / "model"))
    low = root / "low"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISVD_CACHE", str(root / "cache"))
        words = ("compress", "--model", model, "--ratio", 0.6, *QUICK, "--output", low)
        told = succeed(*words).stderr
    assert f"{model}/LICENSE links to a file outside its folder and is not copied." in told
    assert lies_there(low) == WRITTEN | LOADER | TRAVELS
    plant(low)
    return low


def test_compress_copies_only_what_belongs_to_a_model(made: Path) -> None:
    assert (made / "terms.txt").is_file()  # the fixture has looked at all else


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--to", "hf"], WRITTEN | LOADER | TRAVELS),
        (["--to", "dense"], WRITTEN - {"plan.json"} | TRAVELS),
        (["--quantize", "int8"], WRITTEN | LOADER | TRAVELS),
    ],
)
def test_convert_copies_only_what_belongs_to_a_model(
    made: Path, here: Path, words: list[str], expected: set[str]
) -> None:
    told = succeed("convert", made, *words, "--output", "out").stderr
    assert lies_there(here / "out") == expected
    assert told.count(f"{made}/LICENSE links to a file outside its folder") == 1


def test_recovery_copies_only_what_belongs_to_a_model(made: Path, here: Path) -> None:
    short = ("--recover-tokens", 200, "--recover-seqlen", 32, "--recover-samples", 8)
    training = ("--recover", "distill", "--recover-dataset", "demo", "--recover-batch", 4, *short)
    succeed("compress", "--from", made, *training, "--output", "out")
    assert lies_there(here / "out") == WRITTEN | LOADER | TRAVELS


def test_a_pt_file_packs_only_what_belongs_to_a_model(made: Path, here: Path) -> None:
    succeed("convert", made, "--to", "pt", "--output", "x.pt")
    assert set(load_pt(here / "x.pt")["files"]) == TRAVELS | {"README.md", "plan.json"}
    assert SECRET.encode() not in (here / "x.pt").read_bytes()


@pytest.mark.parametrize("to", ["hf", "dense"])
def test_a_foreign_pt_file_plants_nothing(made: Path, here: Path, to: str) -> None:
    succeed("convert", made, "--to", "pt", "--output", "x.pt")
    document = torch.load(here / "x.pt", weights_only=True)
    odd = ("../up", "sub/tokenizer.json", "/etc/x", "..", "model.safetensors", "config.json")
    for name in (*PLANTED, *odd):
        document["files"][name] = torch.tensor(list(b"planted"), dtype=torch.uint8)
    torch.save(document, here / "evil.pt")
    succeed("convert", "evil.pt", "--to", to, "--output", "out")
    expected = WRITTEN | LOADER if to == "hf" else WRITTEN - {"plan.json"}
    assert lies_there(here / "out") == expected | TRAVELS
    assert names(here) == ["evil.pt", "out", "x.pt"]
    for path in (here / "out").iterdir():
        assert path.read_bytes() != b"planted", path
    audit = hisvd("inspect", "evil.pt")
    assert audit.exit_code == 1
    assert "file '.bashrc' does not belong" in audit.stdout
    assert succeed("inspect", "x.pt").exit_code == 0


@pytest.mark.parametrize("name", ["README.md", "plan.json"])
def test_a_pt_file_packs_no_file_from_elsewhere(made: Path, here: Path, name: str) -> None:
    low = Path(shutil.copytree(made, here / "low", symlinks=True))
    (here / "id_rsa").write_text(SECRET)
    (low / name).unlink()
    (low / name).symlink_to("../id_rsa")
    succeed("convert", low, "--to", "pt", "--output", "x.pt")
    assert SECRET.encode() not in (here / "x.pt").read_bytes()


def test_provenance_from_elsewhere_is_not_copied(made: Path, here: Path) -> None:
    low = Path(shutil.copytree(made, here / "low", symlinks=True))
    (here / "docker.json").write_text(f'{{"auths": "{SECRET}"}}')
    (low / "hisvd.json").unlink()
    (low / "hisvd.json").symlink_to("../docker.json")
    for to in ("hf", "dense"):
        message, _ = fail("convert", low, "--to", to, "--output", "out")
        assert "links to a file outside its folder" in message
    with pytest.raises(SourceError, match="outside its folder"):
        _ = open_checkpoint(low).provenance


# Uploading


def test_an_upload_holds_only_what_belongs_to_a_model(made: Path, hub: FakeHub) -> None:
    (made / "notes").mkdir(exist_ok=True)
    (made / "notes" / "private.md").write_text("mine")
    told = succeed("convert", made, "--push-to-hub", "me/low").stderr
    assert set(hub.files) == WRITTEN | LOADER | TRAVELS
    assert all(SECRET.encode() not in data for data in hub.files.values())
    assert "Not uploaded, because not part of a model: .bashrc, .env, LICENSE" in told


def test_weights_from_elsewhere_are_not_uploaded(made: Path, hub: FakeHub, here: Path) -> None:
    low = Path(shutil.copytree(made, here / "low", symlinks=True))
    (low / "model.safetensors").rename(here / "other.safetensors")
    (low / "model.safetensors").symlink_to("../other.safetensors")
    message, _ = fail("convert", low, "--push-to-hub", "me/low")
    assert "outside its folder" in message
    assert hub.files == {}


# Names and links


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3"),
        *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
        *("spiece.model", "sentencepiece.bpe.model", "tekken.json", "qwen.tiktoken"),
        *("chat_template.jinja", "chat_template.json", "generation_config.json"),
        *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
        *("LICENSE", "LICENSE.txt", "LICENCE.md", "LICENSE-APACHE", "LICENSE_MODEL.txt"),
        *("NOTICE", "Notice.txt", "USE_POLICY.md", "COPYING"),
    ],
)
def test_what_travels(name: str) -> None:
    assert is_companion(name)


@pytest.mark.parametrize(
    "name",
    [
        *PLANTED,
        *("tokenization_own.py", "tokenizer.json.bak", "tokenizer.json\n", ".tokenizer.json"),
        *("vocab.pkl", "LICENSE.sh", "generation_config.py", "chat_template.py", "tokens.txt"),
        *("tokenizer.model.v3.py", "x/tokenizer.json", "../tokenizer.json", "config.json", ""),
    ],
)
def test_what_does_not_travel(name: str) -> None:
    assert not is_companion(name)


@pytest.mark.parametrize("where", ["cache", "elsewhere"])
def test_links_of_a_hub_cache_travel(
    here: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    repository = here / where / "models--me--model"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "ab").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/ab")
    (here / "mine.txt").write_text(SECRET)
    (snapshot / "LICENSE").symlink_to(here / "mine.txt")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "cache"))
    assert [path.name for path in companions(snapshot)] == ["tokenizer.json"]
    loose = here / "loose"
    loose.mkdir()
    (loose / "tokenizer.json").symlink_to(repository / "blobs" / "ab")
    assert len(companions(loose)) == (where == "cache")


def test_a_link_to_itself_or_to_nothing_does_not_travel(here: Path) -> None:
    (here / "LICENSE").symlink_to("LICENSE")
    (here / "NOTICE").symlink_to("absent")
    (here / "tokenizer.json").mkdir()
    assert companions(here) == []
