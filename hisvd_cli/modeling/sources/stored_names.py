"""Maps tensor names of a model to names on disk, including those left by wrappers.

Models saved from a wrapper (DataParallel, torch.compile, FSDP, PEFT, a value model) have a prefix
or an extra part in all names. Files may also contain more than the language model, such as a value
head.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from hisvd_cli.utils.errors import UnsupportedModelError

_INNER = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_UNMERGED = re.compile(r"\.(?:lora_[AB]|lora_embedding_[AB]|base_layer|modules_to_save)\.")
_VALUE_HEADS = (
    "v_head.",
    "value_head.",
    "score.",
    "classifier.",
    "reward_head.",
    "regression_head.",
)
_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.masked_bias")
"""Suffixes of buffers that older versions of transformers stored and newer ones compute."""


def find_names(wanted: Collection[str], stored: Iterable[str], base: str) -> dict[str, str]:
    """Return name in the model → name on disk for all tensors that can be matched.

    Args:
        wanted: names in the model.
        stored: names on disk.
        base: prefix of the base model, which is missing if the model was saved without a head.
    """
    known = without_inner(stored)
    best = _matched(wanted, known, base, "")
    if len(best) < len(wanted):
        for prefix in _prefixes(wanted, known, base):
            found = _matched(wanted, known, base, prefix)
            best = found if len(found) > len(best) else best
    return best


def without_inner(stored: Iterable[str]) -> dict[str, str]:
    """Return name without the parts inserted by wrappers → name on disk."""
    names = list(stored)
    known = {_INNER.sub("", name): name for name in names}
    return known if len(known) == len(names) else {name: name for name in names}


def _matched(
    wanted: Collection[str], known: Mapping[str, str], base: str, prefix: str
) -> dict[str, str]:
    found = {}
    for name in wanted:
        for form in (prefix + name, prefix + name.removeprefix(f"{base}.")):
            if form in known:
                found[name] = known[form]
                break
    return found


def _prefixes(wanted: Collection[str], known: Mapping[str, str], base: str) -> list[str]:
    """Return candidates for a common prefix of all names, the shortest first. They are derived from
    the longest name, which has the fewest matches."""
    name = max(wanted, key=len)
    forms = {name, name.removeprefix(f"{base}.")}
    found = {n[: -len(form)] for form in forms for n in known if n.endswith(f".{form}")}
    return sorted(found, key=len)


def refuse_unmerged(name: str, stored: Iterable[str]) -> None:
    """Reject weights that contain an unmerged adapter.

    Raises:
        UnsupportedModelError: they contain one.
    """
    if found := next((each for each in stored if _UNMERGED.search(each)), None):
        raise UnsupportedModelError(
            f"The weights of {name} contain an unmerged adapter of unknown scaling ({found}).",
            "Merge it with PEFT: merge_and_unload, then save_pretrained.",
        )


def value_head(stored: Iterable[str]) -> str:
    """Return the name of a tensor of a value or classification head; empty if there is none."""
    return next((name for name in stored if _part_of(name, _VALUE_HEADS)), "")


def _part_of(name: str, starts: tuple[str, ...]) -> bool:
    if re.search(r"\.\d+\.", name):  # inside a block, such as the classifier of a router
        return False
    return any(name.startswith(start) or f".{start}" in name for start in starts)


def naming_notes(
    names: Mapping[str, str], unused: Iterable[str], base: str, blocks: str, count: int
) -> list[str]:
    """Return notes on names on disk: tensors that are renamed or ignored.

    Args:
        names: name in the model → name on disk, where no rule of transformers renames it.
        unused: names on disk that the model does not use.
        base: prefix of the base model.
        blocks: name of the list of decoder blocks in the model.
        count: number of blocks of the model.
    """
    renamed = {
        name: on_disk
        for name, on_disk in names.items()
        if on_disk not in (name, name.removeprefix(f"{base}."))
    }
    notes = []
    if renamed:
        name, on_disk = next(iter(renamed.items()))
        notes.append(f"Renamed: {_counted(renamed)}, such as {on_disk} to {name}.")
    left = [name for name in unused if not name.endswith(_BUFFERS)]
    left = [name for name in left if not name.endswith(("lm_head.weight", "embed_out.weight"))]
    kinds: dict[str, list[str]] = {}
    for name in left:
        kinds.setdefault(_kind(name, blocks, base, count), []).append(name)
    for kind, found in kinds.items():
        notes.append(f"Ignored: {_counted(found)} {kind}, such as {found[0]}.")
    return notes


def _counted(items: Collection[str]) -> str:
    return "1 tensor" if len(items) == 1 else f"{len(items)} tensors"


def _kind(name: str, blocks: str, base: str, count: int) -> str:
    if _part_of(name, _VALUE_HEADS):
        return "of a value or classification head"
    local = re.escape(blocks.removeprefix(f"{base}."))
    match = re.search(rf"(?:^|\.){local}\.(\d+)\.", name)
    if match and int(match[1]) >= count:
        return f"of blocks beyond the {count} of the config"
    return "that the model does not use"
