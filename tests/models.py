"""Tiny random models of each architecture, with a tokenizer, as folders on disk.

Hidden width 32, two to four blocks, a vocabulary of 300, and 128 positions. Weights are drawn so
that the hidden states neither vanish nor explode.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

VOCABULARY = 300
BOS = 0
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": BOS,
    "eos_token_id": 0,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 16}  # attention is wider than the hidden state
SLIDING_WINDOW = 8
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}),
    "llama_untied": ("LlamaConfig", {**_GROUPED, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": SLIDING_WINDOW}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 8}),
    # Four blocks: where each takes a tensor apart as if it were a tuple, three hide it.
    "opt": (
        "OPTConfig",
        {**_SIZES, "num_hidden_layers": 4, "ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "gemma": ("GemmaConfig", _GEMMA),
    "gemma2": ("Gemma2Config", {**_GEMMA, "sliding_window": SLIDING_WINDOW}),
    "gemma3_text": (
        "Gemma3TextConfig",
        {
            **_GEMMA,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "phi": ("PhiConfig", {**_SIZES, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", _GROUPED),
}
_TEXT = (
    "in the beginning was a small model and it was without form and every weight of it was random "
    "then came the text and the text was made of words and the words were made of letters"
)
_WORDS = _TEXT.split()


def save_model(arch: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model of ``arch`` (a key of CONFIGS) and its tokenizer to ``folder``."""
    name, sizes = CONFIGS[arch]
    config = getattr(transformers, name)(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model)
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def randomize(model: torch.nn.Module) -> None:
    """Draw all weights anew: matrices keep the size of what they are applied to."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "embed" in name:
                parameter.copy_(noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:  # norms, which some architectures centre at 0 and some at 1
                parameter.add_(0.2 * noise)


def save_tokenizer(folder: Path) -> None:
    """Train a byte-level tokenizer on a few words and write it to ``folder``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>"
    ).save_pretrained(folder)


def random_text(words: int, seed: int = 0) -> str:
    """Return a text of ``words`` words that the tokenizer knows."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(_WORDS), (words,), generator=generator).tolist()
    return " ".join(_WORDS[i] for i in chosen)


def random_tokens(sequences: int, length: int, seed: int = 0) -> Tensor:
    """Return token ids ``[sequences, length]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (sequences, length), generator=generator)


def load_dense(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load the whole model with transformers: what the walk is compared with."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file."""
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**document, **changes}), encoding="utf-8")


def names(folder: Path) -> list[str]:
    """Return what lies in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())
