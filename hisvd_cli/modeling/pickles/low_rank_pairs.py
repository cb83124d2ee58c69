"""Recognizes low-rank factors in checkpoints of other tools by name and shape."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hisvd_cli.modeling.pickles.foreign import ForeignCheckpoint, ForeignTensor

# (name of U, name of V): the names differ only in this token, which is a part of the dotted name
# ("q_proj.u_proj") or a word in a part ("q_u_proj"). For A and B, shapes determine which one is U.
_TOKENS = (
    ("u_proj", "v_proj"),
    ("linear_u", "linear_v"),
    ("ALinear", "BLinear"),
    ("weight_u", "weight"),
    ("u", "v"),
    ("U", "V"),
    ("A", "B"),
)


@dataclass(frozen=True)
class LowRankPair:
    """Two tensors U `[m, r]` and V `[r, n]` that replace a dense matrix.

    Attributes:
        name: name of the matrix, such as "model.layers.0.self_attn.q_proj".
        layer: index of its block; None if unknown.
        cluster: last part of the name.
        shape: (m, n).
        rank: r.
        dtype: dtype of U.
        u, v: names of the two tensors.
    """

    name: str
    layer: int | None
    cluster: str
    shape: tuple[int, int]
    rank: int
    dtype: str
    u: str
    v: str


def find_pairs(checkpoint: ForeignCheckpoint) -> tuple[list[LowRankPair], list[ForeignTensor]]:
    """Return the low-rank pairs, and the other 2-D weights of decoder blocks.

    The names of a pair differ in one u/v-like token, and its tensors share an inner dimension that
    is smaller than the matrix. Names are converted to those of `transformers`: "q_u_proj" and
    "q_proj.u_proj" both become "q_proj".
    """
    pairs: list[LowRankPair] = []
    used: set[str] = set()
    for name, tensor in checkpoint.tensors.items():
        for partner, base in _partners(name):
            other = checkpoint.tensors.get(partner)
            if other is None or used & {name, partner}:
                continue
            pair = _pair(base, tensor, other)
            if pair is not None:
                pairs.append(pair)
                used |= {name, partner}
    dense = [t for t in checkpoint.tensors.values() if t.name not in used]
    return pairs, [t for t in dense if _is_block_linear(t, checkpoint.classes)]


def _partners(name: str) -> Iterator[tuple[str, str]]:
    """Yield (name of V, name of the dense matrix) for every interpretation of `name` as a U."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        for partner, base in _part_partners(part):
            dense = [*parts[:i], *([base] if base else []), *parts[i + 1 :]]
            if dense[-1:] == ["weight"]:
                dense.pop()
            yield ".".join([*parts[:i], partner, *parts[i + 1 :]]), ".".join(dense)


def _part_partners(part: str) -> list[tuple[str, str]]:
    for u, v in _TOKENS:
        if part == u:
            return [(v, "")]
    words = part.split("_")
    found = []
    for i, word in enumerate(words):
        for v in (v for u, v in _TOKENS if u == word):
            base = "_".join([*words[:i], *words[i + 1 :]])
            base = re.sub(r"^(fc\d+)_proj$", r"\1", base)  # SVD-LLM names OPT's fc1 fc1_u_proj
            found.append(("_".join([*words[:i], v, *words[i + 1 :]]), base))
    return found


def _pair(name: str, first: ForeignTensor, second: ForeignTensor) -> LowRankPair | None:
    if len(first.shape) != 2 or len(second.shape) != 2 or not name:
        return None
    orders = [(u, v) for u, v in ((first, second), (second, first)) if u.shape[1] == v.shape[0]]
    if not orders:
        return None
    u, v = min(orders, key=lambda order: order[0].shape[1])
    m, r, n = u.shape[0], u.shape[1], v.shape[1]
    if r >= max(m, n) or 0 in (m, n, r):
        return None
    parts = name.split(".")
    return LowRankPair(name, _layer(parts), parts[-1], (m, n), r, u.dtype, u.name, v.name)


def _layer(parts: list[str]) -> int | None:
    return next((int(part) for part in parts if re.fullmatch(r"[0-9]{1,6}", part)), None)


def _is_block_linear(tensor: ForeignTensor, classes: dict[str, str]) -> bool:
    *module, last = tensor.name.split(".")
    return (
        last == "weight"
        and len(tensor.shape) == 2
        and min(tensor.shape) > 1
        and _layer(module) is not None
        and not classes.get(".".join(module), "").endswith("Embedding")
    )
