"""The model card: metadata that the hub takes, and no claim that was not measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load

from hisvd_cli.allocation.plan import Plan
from hisvd_cli.evaluation.perplexity import PerplexityResult
from hisvd_cli.export.card_results import CardResult, update_card
from hisvd_cli.export.model_card import write_card
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.conversion import convert_checkpoint
from hisvd_cli.pipelines.evaluating.cards import perplexity_results
from hisvd_cli.utils.errors import SourceError
from tests.workbench import bench, compress_to, plan_at, tree

RESULT = PerplexityResult("wikitext2", "test", 27.48876, 2046, 2, 1024, "none", "ab" * 32, [])
DENSE = PerplexityResult("wikitext2", "test", 16.4512345, 2046, 2, 1024, "none", "ab" * 32, [])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    root = tmp_path_factory.mktemp("card")
    workbench = bench(root)
    plan = plan_at(workbench, 0.6)
    compress_to(workbench, plan, root / "low")
    return root / "low", plan


@pytest.fixture
def folder(made: tuple[Path, Plan], tmp_path: Path) -> Path:
    """A folder with the card of a checkpoint, and what a card is made from."""
    for name in ("README.md", "hisvd.json"):
        (tmp_path / name).write_bytes((made[0] / name).read_bytes())
    return tmp_path


def metadata(folder: Path) -> ModelCardData:
    """Read a card back, and hold its metadata to be the same when it is written again."""
    card = ModelCard((folder / "README.md").read_text(encoding="utf-8"))
    assert ModelCard(str(card)).data.__dict__ == card.data.__dict__
    assert isinstance(card.data, ModelCardData)
    return card.data


def test_the_card_of_a_checkpoint_claims_nothing(made: tuple[Path, Plan]) -> None:
    metadata(made[0])
    assert metadata_load(made[0] / "README.md") == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hisvd", "low-rank", "compression"],
    }
    text = (made[0] / "README.md").read_text(encoding="utf-8")
    assert "Not measured yet." in text
    assert f"| parameters kept, whole model | {made[1].model_ratio:.2%} |" in text
    assert 'from_pretrained("PATH", trust_remote_code=True)' in text


def card_of(source: Source, plan: Plan, folder: Path) -> ModelCardData:
    model = {"name": source.name}
    folder.mkdir()
    write_card(
        folder, source, plan, {"model": model, "decomposer": "whitened", "calibration": None}
    )
    return metadata(folder)


def test_base_model_and_licence_are_carried_over(made: tuple[Path, Plan], tmp_path: Path) -> None:
    home = tmp_path / "source"
    home.mkdir()
    source = Source("maker/model", home, revision="0" * 40)
    data = card_of(source, made[1], tmp_path / "bare")
    assert (data.base_model, data.license) == ("maker/model", None)
    (home / "LICENSE.txt").write_text("be nice")
    data = card_of(source, made[1], tmp_path / "file")
    assert (data.license, data.license_link) == ("other", "LICENSE.txt")
    (home / "README.md").write_text("---\nlicense: llama2\nlanguage: [en]\ntags: [x]\n---\n# M\n")
    data = card_of(source, made[1], tmp_path / "card")
    assert (data.license, data.license_link, data.language) == ("llama2", None, ["en"])
    assert data.tags == ["hisvd", "low-rank", "compression"]
    (home / "README.md").write_text("---\n: [\n---\n# damaged\n")
    assert card_of(source, made[1], tmp_path / "damaged").license == "other"
    local = card_of(Source(str(home), home), made[1], tmp_path / "local")
    assert local.base_model is None  # a folder is no model of the hub
    assert str(tmp_path) not in (tmp_path / "local" / "README.md").read_text(encoding="utf-8")


def test_results_go_into_the_model_index(folder: Path) -> None:
    update_card(folder, perplexity_results([RESULT], [DENSE]))
    data = metadata(folder)
    assert data.model_name == "demo-0.6"
    assert data.eval_results == [
        EvalResult(
            task_type="text-generation",
            dataset_type="Salesforce/wikitext",
            dataset_name="wikitext2",
            dataset_config="wikitext-2-raw-v1",
            dataset_split="test",
            metric_type="perplexity",
            metric_name="perplexity",
            metric_value=27.489,
            metric_args={
                "windows": 2,
                "seqlen": 1024,
                "bos": "none",
                "text_sha256": "ab" * 32,
                "dense": 16.451,
            },
        )
    ]
    document = metadata_load(folder / "README.md")
    assert document is not None
    (index,) = document["model-index"]
    assert index["results"][0]["metrics"][0]["value"] == 27.489
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "Not measured yet." not in text
    assert (
        "| wikitext2 (test) | perplexity | 16.451 | 27.489 "
        "| windows 2, seqlen 1024, bos none, text abababababab |" in text
    )


def test_later_results_join_or_replace_earlier_ones(folder: Path) -> None:
    path = folder / "README.md"
    path.write_text(path.read_text(encoding="utf-8") + "\nMine.\n", encoding="utf-8")
    update_card(folder, perplexity_results([RESULT], [DENSE]))
    once = path.read_bytes()
    update_card(folder, perplexity_results([RESULT], [DENSE]))
    assert path.read_bytes() == once
    other = CardResult("arc_easy", "accuracy", 0.25, details={"shots": 0})
    broken = CardResult("/home/me/book.txt", "perplexity", None, split="file")
    update_card(folder, [other, broken, *perplexity_results([DENSE])])
    results = metadata(folder).eval_results
    assert results is not None
    assert [(r.dataset_name, r.metric_value) for r in results] == [
        ("wikitext2", 16.451),
        ("arc_easy", 0.25),
        ("book.txt", "not finite"),
    ]
    text = path.read_text(encoding="utf-8")
    assert "| wikitext2 (test) | perplexity | not measured | 16.451 |" in text
    assert "/home/me" not in text
    assert text.endswith("\nMine.\n")
    path.write_text(text.replace("<!-- hisvd", "<!-- gone"), encoding="utf-8")
    update_card(folder, [])
    assert "## Evaluation\n\n<!-- hisvd" in path.read_text(encoding="utf-8")


def test_cards_that_cannot_be_updated(folder: Path) -> None:
    (folder / "README.md").write_text("---\n: [\n---\n")
    with pytest.raises(SourceError, match="damaged"):
        update_card(folder, [])
    (folder / "README.md").unlink()
    with pytest.raises(SourceError, match=r"no README\.md"):
        update_card(folder, [])


def test_a_dense_folder_has_a_card_of_its_own(made: tuple[Path, Plan], tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert_checkpoint(made[0], "dense", tmp_path / name, False, 10**9)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    text = (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    assert "Not measured yet." in text
    assert "trust_remote_code" not in text
    assert metadata(tmp_path / "one").eval_results is None
