"""Tokenizes text and splits it into windows.

A text is tokenized once, with the special tokens that the tokenizer adds, and split into
non-overlapping windows. A BOS token is therefore at most at the start of the text, not in every
window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from hisvd_cli.calibration.text.chats import rendered
from hisvd_cli.calibration.text.token_ids import known_ids
from hisvd_cli.modeling.sources.companions import companions
from hisvd_cli.utils.errors import DataError
from hisvd_cli.utils.files.fingerprints import file_digest

if TYPE_CHECKING:
    from torch import Tensor

    from hisvd_cli.calibration.text.datasets import Text
    from hisvd_cli.modeling.sources.source import Source


def tokenize(text: Text, source: Source) -> Tensor:
    """Return the token ids ``[T]`` of a whole text, which the caller must not modify.

    Raises:
        DataError: the model has no embedding for a token.
    """
    return known_ids(_encoded(text, source, False)[0], source)


_Encoded: TypeAlias = "tuple[Tensor, Tensor | None]"
_RECENT: dict[tuple[object, ...], _Encoded] = {}
_MOST_RECENT, _MOST_TOKENS = 4, 1 << 22
"""Number of texts whose tokens are cached, and their maximum length (32 MB each, and as much for
offsets)."""


def _encoded(text: Text, source: Source, offsets: bool) -> _Encoded:
    """Return the tokens of a text and, if requested, the end of each.

    Recent results are cached by tokenizer, since a model is often evaluated before and after
    compression.
    """
    files = [(path.name, file_digest(path)) for path in companions(source.folder)]
    home = "" if files and not source.runs_code else str(source.folder)
    key = (text.digest, bool(text.chats), offsets, home, *files)
    if key in _RECENT:
        return _RECENT[key]
    made = _encode(text, source, offsets)
    if len(made[0]) <= _MOST_TOKENS:
        while len(_RECENT) >= _MOST_RECENT:
            del _RECENT[next(iter(_RECENT))]
        _RECENT[key] = made
    return made


def _encode(text: Text, source: Source, offsets: bool) -> _Encoded:
    import torch

    content, more = _tokenized_as(text, source)
    if not offsets:  # verbose=False: the text may be longer than the model's maximum length
        ids = source.tokenizer(content, verbose=False, **more)["input_ids"]
        return torch.tensor(ids, dtype=torch.long), None
    encoded = source.tokenizer(content, verbose=False, return_offsets_mapping=True, **more)
    data = torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8)
    # Bytes of the form 10xxxxxx continue a character.
    starts = ((data & 0xC0) != 0x80).nonzero().flatten()
    stops = torch.cat([starts, torch.tensor([len(data)])])
    ends = stops[torch.tensor([end for _, end in encoded["offset_mapping"]])]
    return torch.tensor(encoded["input_ids"], dtype=torch.long), ends.cummax(0).values


def _tokenized_as(text: Text, source: Source) -> tuple[str, dict[str, Any]]:
    """Return the text for the tokenizer and its options. Chat templates already contain special
    tokens. Raises DataError."""
    if not text.chats:
        return text.content, {}
    return rendered(text.chats, text.name, source), {"add_special_tokens": False}


def token_ends(text: Text, source: Source) -> tuple[Tensor, Tensor | None]:
    """Return the token ids ``[T]`` of a whole text, and the end ``[T]`` of each token in it.

    Ends are offsets in UTF-8 bytes and do not decrease: a character that several tokens share ends
    with the first of them, skipped text belongs to the next token, and a token without text ends
    where the previous one does. The difference of two ends is thus the number of bytes between
    them.

    Ends are None if the tokenizer has no offsets (no fast tokenizer).

    Raises:
        DataError: the model has no embedding for a token.
    """
    ids, ends = _encoded(text, source, source.tokenizer.is_fast)
    return known_ids(ids, source), ends


def sample_windows(tokens: Tensor, samples: int, seqlen: int, seed: int, name: str) -> Tensor:
    """Return random non-overlapping windows ``[S, L]``; a short text gives fewer than ``samples``.

    The result depends only on the tokens, both sizes and the seed.

    Raises:
        DataError: the text is shorter than one window.
    """
    import torch

    available = count_windows(tokens, seqlen, name, "calibration.seqlen")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:samples]
    return tokens[: available * seqlen].view(available, seqlen)[chosen]


def count_windows(tokens: Tensor, seqlen: int, name: str, setting: str) -> int:
    """Return how many windows of ``seqlen`` tokens ``[T]`` give, at least one.

    Args:
        tokens: the text.
        seqlen: tokens per window.
        name: name of the text, for the error.
        setting: profile key of ``seqlen``, for the error.

    Raises:
        DataError: the text is shorter than one window.
    """
    count, length = len(tokens) // seqlen, len(tokens)
    if count == 0:
        raise DataError(
            f"'{name}' has {length:,} tokens, fewer than one window of {seqlen}.",
            f"Lower `{setting}` to {length} or less, or give a longer text."
            if length > 1
            else "Give a longer text.",
        )
    return count


def model_positions(source: Source) -> int | None:
    """Return the maximum sequence length in the configuration of the model, or None."""
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def check_seqlen(seqlen: int, source: Source, flag: str = "`calibration.seqlen`") -> None:
    """Raise DataError if ``seqlen``, which ``flag`` sets, exceeds the model's maximum length."""
    limit = model_positions(source)
    if limit is not None and seqlen > limit:
        raise DataError(
            f"{flag} {seqlen} exceeds the maximum length of {source.name}, {limit} tokens.",
            f"Set {flag} to {limit} or less.",
        )
