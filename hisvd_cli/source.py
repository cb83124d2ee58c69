"""A model as the user names it: hub id, folder, ``.gguf`` file or ``demo`` ─► files on disk."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hisvd_cli.errors import SourceError, UnsupportedModelError
from hisvd_cli.json_files import read_json
from hisvd_cli.library_errors import library_errors
from hisvd_cli.paths import digest, expanded, file_digest
from hisvd_cli.tensorfile import reason
from hisvd_cli.unpickle import clean
from hisvd_cli.weights import LAYOUTS, Weights, open_weights, shard_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "demo"
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "tokenizer*", "*.py", "*.md", "LICENSE*"]


@dataclass(frozen=True)
class Source:
    """A model on disk.

    Attributes:
        name: what the user wrote.
        folder: local folder with config, tokenizer and weights.
        revision: the hub's commit, or None for a local model.
    """

    name: str
    folder: Path
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def original(self) -> Source:
        """The model as it was published: itself, but for one with corrected weights."""
        return self

    @cached_property
    def config(self) -> PretrainedConfig:
        """The config. Raises UnsupportedModelError for a type that transformers does not know."""
        from transformers import AutoConfig

        with library_errors(self._unknown_config):
            config: PretrainedConfig = AutoConfig.from_pretrained(
                self.folder, trust_remote_code=self.trust_remote_code
            )
        check_config(config, self.name)
        return config

    def _unknown_config(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"transformers cannot read the config of {self.name}: {why}",
            "Update transformers, or pass --trust-remote-code if the model ships its own code "
            "and you trust it.",
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises SourceError where it is missing."""
        from transformers import AutoTokenizer

        with library_errors(self._no_tokenizer):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=self.trust_remote_code
            )
            tokenizer("a", verbose=False)  # odd values in its files are found when it is used
        return tokenizer

    def _no_tokenizer(self, why: str) -> SourceError:
        return SourceError(
            f"{self.name} has no tokenizer that loads: {why}",
            "Put the tokenizer's files beside the weights.",
        )

    @cached_property
    def weights(self) -> Weights:
        """The tensors on disk, read one at a time. Raises SourceError."""
        return open_weights(self.folder)

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """``quantization_config`` of config.json, empty for a model in full precision.

        Raises:
            SourceError: it is no JSON object.
        """
        found = read_config(self.folder).get("quantization_config")
        if found is not None and not isinstance(found, dict):
            raise SourceError(
                f"{self.folder / 'config.json'}: quantization_config must be a JSON object, and is "
                f"{clean(repr(found))}.",
                "Remove it, or download the model again.",
            )
        return found or {}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 that names config and weights: by commit on the hub, by content elsewhere."""
        if self.revision:
            return digest("hub", self.name, self.revision)
        parts = [digest((self.folder / "config.json").read_bytes())]
        parts += [f"{path.name} {file_digest(path)}" for path in self.weights.files]
        return digest(*parts)


_LARGEST = {
    "num_hidden_layers": 10_000,
    "head_dim": 1 << 16,
    "hidden_size": 1 << 20,
    "num_attention_heads": 1 << 16,
    "intermediate_size": 1 << 30,
    "vocab_size": 1 << 30,
}
"""Sizes in a config that take time or memory before any weight is looked at."""


def check_config(config: PretrainedConfig, name: str) -> None:
    """Raise UnsupportedModelError where a size of a config is one that no model has, or where its
    architectures are no names."""
    text = config.get_text_config()
    for key, largest in _LARGEST.items():
        size = getattr(text, key, None)
        if isinstance(size, int) and not 1 <= size <= largest:
            raise UnsupportedModelError(
                f"The config of {name} names {key} {size}, which must be from 1 to {largest}.",
                "Download the model again.",
            )
    named = config.architectures or []
    if not isinstance(named, list) or not all(isinstance(each, str) for each in named):
        raise UnsupportedModelError(
            f"The config of {name} names the architectures {clean(repr(named))}, not a list.",
            "Download the model again.",
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Return the parsed config.json of a folder. Raises SourceError."""
    path = folder / "config.json"
    try:
        document = read_json(path, strict=False)
    except FileNotFoundError as error:
        raise SourceError(
            f"{folder} holds no config.json, so it is no Hugging Face model.",
            "Give the folder that holds config.json and the weights.",
        ) from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} is no valid JSON file.", "Fetch the model again.") from error
    if not isinstance(document, dict):
        raise SourceError(f"{path} holds no JSON object.", "Fetch the model again.")
    return document


def open_source(
    name: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    compressible: bool = True,
) -> Source:
    """Find a model: an existing path wins, then ``demo``, then the hub.

    Args:
        name: folder, ``.gguf`` file, ``demo`` or hub id.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run the Python code that the model ships.
        compressible: of a hub model, refuse one that cannot be compressed before its weights are
            fetched; False takes every causal language model, compressed ones too.

    Raises:
        SourceError: nothing by that name, or it cannot be fetched.
        UnsupportedModelError: a hub model that cannot be worked on.
    """
    path = expanded(name)
    if path.is_dir():
        read_config(path)
        return Source(name, path, trust_remote_code=trust_remote_code)
    if path.is_file():
        return _from_file(name, path)
    if name == DEMO:
        return Source(name, DEMO_FOLDER)
    if not _HUB_ID.fullmatch(name) or path.suffix in {".gguf", ".pt", ".safetensors"}:
        raise SourceError(
            f"No model at '{name}': it is no folder, no .gguf file and no hub id.",
            "Check the path, or give a hub id such as 'HuggingFaceTB/SmolLM2-135M', or 'demo'.",
        )
    return _from_hub(name, revision, trust_remote_code, compressible)


def _from_file(name: str, path: Path) -> Source:
    if path.suffix != ".gguf":
        raise SourceError(
            f"'{name}' is a file, but no .gguf file.",
            "Give the folder that holds config.json and the weights.",
        )
    from hisvd_cli.gguf_input import unpack_gguf

    return Source(name, unpack_gguf(path))


def _from_hub(
    name: str, revision: str | None, trust_remote_code: bool, compressible: bool
) -> Source:
    """Fetch config and tokenizer first, so that an unsupported model fails before its weights."""
    folder = _snapshot(name, revision, _SMALL_FILES)
    read_config(folder)
    source = Source(name, folder, folder.name, trust_remote_code)
    _check_structure(source, compressible)
    for files in _weight_files(folder):
        # By commit, so that weights and config stay of one kind if the branch moves meanwhile.
        _snapshot(name, source.revision, files)
        if (folder / files[0]).is_file():
            return source
    raise SourceError(
        f"'{name}' holds neither {LAYOUTS[0][1]} nor {LAYOUTS[1][1]}, whole or in shards.",
        "Try another model; without a network, one that was fetched to its end before.",
    )


def _check_structure(source: Source, compressible: bool) -> None:
    from hisvd_cli.skeleton import build_meta_model, decoder_blocks
    from hisvd_cli.sublayers import find_sublayers

    model = build_meta_model(source, compressed=not compressible)
    if compressible:
        prefix, layers = decoder_blocks(model)
        find_sublayers(prefix, list(layers))


def _weight_files(folder: Path) -> list[list[str]]:
    """Return which files may hold the weights, exactly, in the order of preference.

    A repository may hold the same weights several times, in other formats and folders.
    """
    return [
        shard_files(folder / index) if (folder / index).is_file() else [single]
        for index, single in LAYOUTS
    ]


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise SourceError(
            f"'{name}' is gated on the hub.",
            "Accept its terms on the hub's page, then set HF_TOKEN or run 'hf auth login'.",
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"No model '{name}': no such folder here and no such model on the hub.",
            "Check the spelling; for a private model set HF_TOKEN.",
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise SourceError(
            f"'{name}' is no folder here, and cannot be fetched from the hub: {reason(error)}",
            "Check the name and the network, or give the path of a downloaded model.",
        ) from error
