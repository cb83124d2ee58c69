"""A model on disk: config, tokenizer, weights and fingerprint."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hisvd_cli.modeling.pickles.records import clean
from hisvd_cli.modeling.sources import adapter_input
from hisvd_cli.modeling.sources.adapter_input import Adapter, open_adapter
from hisvd_cli.modeling.sources.model_config import check_dtype, plain_config
from hisvd_cli.modeling.sources.plain_weights import dequantized
from hisvd_cli.modeling.sources.quantized_input import FILES as QUANTIZATION_FILES
from hisvd_cli.modeling.sources.quantized_input import OWN, config_says
from hisvd_cli.modeling.sources.weights import Weights, open_weights
from hisvd_cli.utils.errors import SourceError, UnsupportedModelError
from hisvd_cli.utils.files.fingerprints import digest, file_digest
from hisvd_cli.utils.files.json_files import read_json
from hisvd_cli.utils.library_errors import library_errors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[2] / "demo"
_LOADER = "modeling_hisvd"
"""The loader module in compressed checkpoints, for use without hisvd."""


@dataclass(frozen=True)
class Source:
    """A model on disk.

    Attributes:
        name: the model as named by the user.
        folder: local folder with config, tokenizer and weights.
        revision: commit on the Hub; None for a local model.
        trust_remote_code: run the Python code that the model ships.
        adapter_folder: folder of a LoRA adapter, if it is not ``folder``.
    """

    name: str
    folder: Path
    revision: str | None = None
    trust_remote_code: bool = False
    adapter_folder: Path | None = None

    @property
    def original(self) -> Source:
        """The original model, for a model with corrected weights; otherwise itself."""
        return self

    @cached_property
    def runs_code(self) -> bool:
        """Whether to run the code that the model ships: if it is trusted, and not a copy of hisvd's
        loader, for which the installed one is used. Raises SourceError."""
        return self.trust_remote_code and not names_own_loader(read_config(self.folder))

    @property
    def carries_code(self) -> bool:
        """Whether derived checkpoints need the code that the model ships. Raises SourceError."""
        if not self.runs_code:
            return False
        return "AutoModelForCausalLM" in (read_config(self.folder).get("auto_map") or {})

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's config.

        Raises:
            UnsupportedModelError: transformers does not support the model type.
            SourceError: config.json is missing, damaged, or has a dtype unknown to torch.
        """
        from transformers import AutoConfig

        check_dtype(self.name, read_config(self.folder))
        with library_errors(self._unknown_config):
            config: PretrainedConfig = AutoConfig.from_pretrained(
                self.folder, trust_remote_code=self.runs_code
            )
        check_config(config, self.name)
        if self.quantization.get("quant_method") != OWN:
            for part in (config, config.get_text_config()):
                part.__dict__.pop("quantization_config", None)  # weights are read dequantized
        return config

    def _unknown_config(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"transformers cannot read the config of {self.name}: {why}",
            "Update transformers, or use `model.trust_remote_code` if the model ships its own code "
            "and you trust it.",
        )

    @cached_property
    def plain_config(self) -> dict[str, Any]:
        """config.json without the settings of a quantization that is undone when weights are
        read."""
        document = read_config(self.folder)
        own = self.quantization.get("quant_method") == OWN
        return document if own else plain_config(document, self.weights.dtype)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises SourceError if it is missing or damaged."""
        from transformers import AutoTokenizer

        given = {}
        if self.trust_remote_code and not self.runs_code:
            # Otherwise transformers reads the config itself and runs the code named there.
            given["config"] = copy.deepcopy(self.config)
            given["config"].auto_map = {}
        with library_errors(self._no_tokenizer):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=self._tokenizer_runs_code, **given
            )
            tokenizer("a", verbose=False)  # some invalid values only raise errors in use
        return tokenizer

    def _no_tokenizer(self, why: str) -> SourceError:
        return SourceError(
            f"The tokenizer of {self.name} cannot be loaded: {why}",
            "Put the tokenizer files into the model's folder.",
        )

    @property
    def _tokenizer_runs_code(self) -> bool:
        """Whether to run custom code for the tokenizer, which may exist without code for the
        model."""
        path = self.folder / "tokenizer_config.json"
        if not (self.trust_remote_code and path.is_file()):
            return self.runs_code
        return not names_own_loader(_read_object(path))

    @cached_property
    def weights(self) -> Weights:
        """The model's tensors, dequantized and with an adapter merged in as they are read.

        Raises:
            SourceError: tensors are missing or damaged.
            UnsupportedModelError: the quantization format or the adapter is not supported.
        """
        return self._opened[0]

    @property
    def notes(self) -> list[str]:
        """Notes on dequantized and merged weights. Raises HisvdError."""
        return self._opened[1]

    @cached_property
    def _opened(self) -> tuple[Weights, list[str]]:
        raw = open_weights(self.folder)
        weights, notes = dequantized(self.name, self.folder, read_config(self.folder), raw)
        if self.adapter is None:
            return weights, notes
        if self.quantization.get("quant_method") == OWN:
            raise UnsupportedModelError(*adapter_input.on_compressed(self.name))
        weights, more = adapter_input.merged(self.adapter, weights)
        return weights, [*notes, *more]

    @cached_property
    def adapter(self) -> Adapter | None:
        """The LoRA adapter of the model, if any. Raises SourceError."""
        return open_adapter(self.adapter_folder or self.folder)

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """The quantization settings in config.json; empty for a model in full precision.

        Raises:
            SourceError: they are not a JSON object.
        """
        return config_says(read_config(self.folder))[1]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config, weights and everything else that affects the model's outputs:
        identified by commit for Hub models, by content for local ones."""
        if self.revision:
            parts = ["hub", self.name, self.revision]
        else:
            parts = [digest((self.folder / "config.json").read_bytes())]
            parts += [f"{path.name} {file_digest(path)}" for path in self.weights.files]
            parts += _named_digests(self.folder, ("generation_config.json", *QUANTIZATION_FILES))
        if self.adapter and self.adapter_folder:
            parts += ["adapter", *(file_digest(path) for path in self.adapter.files)]
        if self.trust_remote_code and self.quantization.get("quant_method") != OWN:
            parts += _named_digests(self.folder, sorted(p.name for p in self.folder.glob("*.py")))
        return digest(*parts)


def _named_digests(folder: Path, names: Iterable[str]) -> list[str]:
    paths = [folder / name for name in names]
    return [f"{path.name} {file_digest(path)}" for path in paths if path.is_file()]


_LARGEST = {
    "num_hidden_layers": 10_000,
    "head_dim": 1 << 16,
    "hidden_size": 1 << 20,
    "num_attention_heads": 1 << 16,
    "intermediate_size": 1 << 30,
    "vocab_size": 1 << 30,
}
"""Limits for sizes in a config that cost time or memory before weights are read."""


def check_config(config: PretrainedConfig, name: str) -> None:
    """Raise UnsupportedModelError if a size is out of range, or if the architectures are not
    names."""
    text = config.get_text_config()
    for key, largest in _LARGEST.items():
        try:
            size = getattr(text, key, None)
        except RuntimeError:  # it differs between blocks
            continue
        least = 0 if key == "head_dim" else 1  # 0 in models without rotary dimensions
        if isinstance(size, int) and not least <= size <= largest:
            raise UnsupportedModelError(
                f"The config of {name} has {key} {size}, which must be from {least} to {largest}.",
                "Download the model again.",
            )
    named = config.architectures or []
    if not isinstance(named, list) or not all(isinstance(each, str) for each in named):
        raise UnsupportedModelError(
            f"The config of {name} has the architectures {clean(repr(named))}, not a list.",
            "Download the model again.",
        )


def code_modules(config: Mapping[str, Any]) -> set[str]:
    """Return the code modules that a config names, without their repositories."""
    auto_map = config.get("auto_map")
    named = auto_map.values() if isinstance(auto_map, dict) else auto_map or ()
    classes = [one for each in named for one in (each if isinstance(each, list) else [each])]
    # REPOSITORY--MODULE.CLASS
    return {str(each).split("--")[-1].split(".")[0] for each in classes if each}


def names_own_loader(config: Mapping[str, Any]) -> bool:
    """Return whether the code that a config names is hisvd's loader."""
    return _LOADER in code_modules(config)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the parsed config.json of a folder.

    Raises:
        SourceError: it is missing or damaged, or names Hub code as an attention implementation,
            which transformers may run without ``trust_remote_code``.
    """
    path = folder / "config.json"
    config = _read_object(path)
    for key, value in _nested(config):
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise SourceError(
                f"{path} names Hub code as {key}: '{value}'.",
                f"Remove {key} from the file; it is not part of a model.",
            )
    return config


def _nested(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a JSON object and of nested objects."""
    left: list[tuple[str, Any]] = list(document.items())
    while left:
        key, value = left.pop()
        yield key, value
        if isinstance(value, dict):  # *_implementation may have a value for each submodel
            inner = key if key.endswith("_implementation") else ""
            left += [(inner or str(name), each) for name, each in value.items()]


def _read_object(path: Path) -> dict[str, Any]:
    try:
        document = read_json(path, strict=False)
    except FileNotFoundError as error:
        raise SourceError(
            f"{path.parent} has no {path.name}, so it is not a Hugging Face model.",
            "Give the folder that contains config.json and the weights.",
        ) from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} is not valid JSON.", "Download the model again.") from error
    if not isinstance(document, dict):
        raise SourceError(f"{path} is not a JSON object.", "Download the model again.")
    return document
