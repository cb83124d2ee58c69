"""Uploading to the hub, here a fake one on this machine; the real one is never asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.cli_helpers import as_json, fail, script, succeed
from tests.fake_hub import TOKEN, FakeHub, fake_hub
from tests.workbench import bench, compress_to, plan_at, tree

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("publish")
    workbench = bench(root)
    compress_to(workbench, plan_at(workbench, 0.6), root / "low")
    return root / "low"


def test_a_checkpoint_is_uploaded_as_it_is(made: Path, hub: FakeHub) -> None:
    (made / ".model.safetensors.abc.tmp").write_text("left by a killed run")
    (made / "block-00001.part").write_text("left by a killed run")
    try:
        document = as_json("convert", made, "--push-to-hub", "me/low", "--private")
    finally:
        (made / ".model.safetensors.abc.tmp").unlink()
        (made / "block-00001.part").unlink()
    assert document == {"output": str(made), "url": f"{hub.url}/me/low"}
    assert hub.files == tree(made)
    (created,) = hub.created
    assert (created["name"], created["organization"]) == ("low", "me")
    assert created.get("private") is True or created.get("visibility") == "private"
    assert (hub.commits, hub.branches) == (["main"], [])


def test_a_conversion_is_uploaded_to_a_branch(made: Path, hub: FakeHub, here: Path) -> None:
    words = ("convert", made, "--to", "dense", "--output", "dense", "--push-to-hub", "me/low")
    shown = succeed(*words, "--revision", "dense")
    assert f"{hub.url}/me/low/tree/dense" in shown.stdout
    assert hub.files == tree(here / "dense")
    assert (hub.commits, hub.branches) == (["dense"], ["dense"])


@pytest.mark.slow
def test_the_installed_script_uploads_and_tells_no_token(made: Path, here: Path) -> None:
    with fake_hub() as server:
        env = {
            "HF_ENDPOINT": server.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "HISVD_DEBUG": "1",
        }
        words = ("convert", made, "--push-to-hub")
        done = script(*words, "me/low", "-q", cwd=here, env=env, fresh=True)
        assert (done.returncode, done.stdout) == (0, f"{server.url}/me/low\n"), done.stderr
        refused = script(*words, "them/low", cwd=here, env=env, fresh=True)
    assert refused.returncode == 1
    assert "does not allow this token to write to them/low" in refused.stderr
    assert TOKEN not in done.stderr + refused.stdout + refused.stderr


def test_no_token(made: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    message, hint = fail("convert", made, "--push-to-hub", "me/low")
    assert "no token" in message
    assert "HF_TOKEN" in hint
    assert "hf auth login" in hint
    assert hub.created == []


def test_a_token_that_the_hub_does_not_know(
    made: Path, hub: FakeHub, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    words = ("convert", made, "--to", "dense", "--output", "dense", "--push-to-hub", "me/low")
    message, hint = fail(*words)
    assert "rejected the token" in message
    assert "wrongwrong" not in message + hint
    assert not any(here.iterdir())  # found out before the conversion
    assert hub.created == []


def test_what_the_hub_refuses(made: Path, hub: FakeHub) -> None:
    message, hint = fail("convert", made, "--push-to-hub", "them/low")
    assert message == "The Hub does not allow this token to write to them/low."
    assert TOKEN not in message + hint
    assert hub.files == {}


def test_no_network(made: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    message, _ = fail("convert", made, "--push-to-hub", "me/low")
    assert message.startswith("The Hub cannot be reached: ")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message, _ = fail("convert", made, "--push-to-hub", "me/low")
    assert message == "HF_HUB_OFFLINE is set, so nothing is uploaded."
    assert hub.created == []


def test_what_is_no_checkpoint(made: Path, hub: FakeHub, here: Path) -> None:
    (here / "photos").mkdir()
    assert "not an hisvd checkpoint" in fail("convert", "photos", "--push-to-hub", "me/x")[0]
    (here / "x.pt").write_bytes(b"x")
    assert "not a folder" in fail("convert", "x.pt", "--push-to-hub", "me/x")[0]
    (here / "half").mkdir()
    (here / "half" / "config.json").write_bytes((made / "config.json").read_bytes())
    fail("convert", "half", "--push-to-hub", "me/x")  # its weights are missing
    assert hub.created == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "No target is given."),
        (("--to", "dense"), "--to without --output."),
        (("--output", "x", "--push-to-hub", "me/x"), "--output without --to."),
        (("--private",), "--private and --revision need --push-to-hub."),
        (("--to", "pt", "-o", "x.pt", "--push-to-hub", "me/x"), "--push-to-hub uploads folders"),
        (("--push-to-hub", "a/b/c"), "--push-to-hub a/b/c is not a valid repository name."),
    ],
)
def test_flags_that_do_not_go_together(
    words: tuple[str, ...], message: str, made: Path, hub: FakeHub
) -> None:
    told, _ = fail("convert", made, *words, code=2)
    assert told.startswith(message)
    assert hub.created == []


def test_the_uploaded_card_is_that_of_the_folder(made: Path, hub: FakeHub) -> None:
    succeed("convert", made, "--push-to-hub", "low")
    assert hub.files["README.md"].decode().startswith("---\nlibrary_name: transformers\n")
    assert json.loads(hub.files["config.json"])["quantization_config"]["quant_method"] == "hisvd"
