"""Text ─► token ids, and windows of them.

A text is tokenized once, with the tokenizer's own special tokens, and cut into windows that do not
overlap. No window gets a BOS of its own; the text gets one where the tokenizer adds it.
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
    """Return the token ids ``[T]`` of a whole text, tokenized as one sequence; do not edit them.

    Raises:
        DataError: the model has no embedding for one.
    """
    return known_ids(_encoded(text, source, False)[0], source)


_Encoded: TypeAlias = "tuple[Tensor, Tensor | None]"
_RECENT: dict[tuple[object, ...], _Encoded] = {}
_MOST_RECENT, _MOST_TOKENS = 4, 1 << 22
"""Of how many texts tokens are kept, and of how long ones: 32 MB each, and as much for places."""


def _encoded(text: Text, source: Source, places: bool) -> _Encoded:
    """Tokenize a text, unless a model with the same tokenizer did so just now, as one does before
    and after a compression; also return where each token ends, if asked."""
    files = [(path.name, file_digest(path)) for path in companions(source.folder)]
    home = "" if files and not source.runs_code else str(source.folder)
    key = (text.digest, bool(text.chats), places, home, *files)
    if key in _RECENT:
        return _RECENT[key]
    made = _encode(text, source, places)
    if len(made[0]) <= _MOST_TOKENS:
        while len(_RECENT) >= _MOST_RECENT:
            del _RECENT[next(iter(_RECENT))]
        _RECENT[key] = made
    return made


def _encode(text: Text, source: Source, places: bool) -> _Encoded:
    import torch

    content, more = _tokenized_as(text, source)
    if not places:  # longer than the model's window: that is meant, not a mistake
        ids = source.tokenizer(content, verbose=False, **more)["input_ids"]
        return torch.tensor(ids, dtype=torch.long), None
    encoded = source.tokenizer(content, verbose=False, return_offsets_mapping=True, **more)
    data = torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8)
    # Bytes of the form 10xxxxxx go on with a character that began before them.
    starts = ((data & 0xC0) != 0x80).nonzero().flatten()
    stops = torch.cat([starts, torch.tensor([len(data)])])  # of each character, and of the end
    ends = stops[torch.tensor([end for _, end in encoded["offset_mapping"]])]
    return torch.tensor(encoded["input_ids"], dtype=torch.long), ends.cummax(0).values


def _tokenized_as(text: Text, source: Source) -> tuple[str, dict[str, Any]]:
    """Return what a model's tokenizer is given, and how. A chat template writes special tokens
    itself. Raises DataError."""
    if not text.chats:
        return text.content, {}
    return rendered(text.chats, text.name, source), {"add_special_tokens": False}


def token_ends(text: Text, source: Source) -> tuple[Tensor, Tensor | None]:
    """Return the token ids ``[T]`` of a whole text, and where in it each ends ``[T]``.

    Ends are counted in UTF-8 bytes from the start of the text, and never fall: a character that
    several tokens share ends with the first of them, what a tokenizer skips belongs to the token
    behind it, and a token that stands for no text ends where the one before it does. So the
    difference of two ends is exactly the bytes of the text between them.

    Ends are None for a tokenizer that cannot say where its tokens stand (one without a fast form).

    Raises:
        DataError: the model has no embedding for a token.
    """
    ids, ends = _encoded(text, source, source.tokenizer.is_fast)
    return known_ids(ids, source), ends


def sample_windows(tokens: Tensor, samples: int, seqlen: int, seed: int, name: str) -> Tensor:
    """Draw windows ``[S, L]`` without overlap; S is less than ``samples`` where the text is short.

    The draw depends on the tokens, the two sizes and the seed only.

    Raises:
        DataError: not even one window.
    """
    import torch

    available = len(tokens) // seqlen
    if available == 0:
        raise DataError(
            f"'{name}' holds {len(tokens):,} tokens, too few for one window of {seqlen}.",
            f"Lower --seqlen to {len(tokens)} or less, or give a longer text."
            if len(tokens) > 1
            else "Give a longer text.",
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:samples]
    return tokens[: available * seqlen].view(available, seqlen)[chosen]


def model_positions(source: Source) -> int | None:
    """Return the longest sequence that the model has positions for, where its config says."""
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def check_seqlen(seqlen: int, source: Source, flag: str = "--seqlen") -> None:
    """Raise DataError where ``seqlen``, which a flag sets, is longer than the model's positions."""
    limit = model_positions(source)
    if limit is not None and seqlen > limit:
        raise DataError(
            f"{flag} {seqlen} is longer than the {limit} positions of {source.name}.",
            f"Use {flag} {limit} or less.",
        )
