"""Reads tensors of a model through the conversion rules of transformers.

Checkpoints on disk may name tensors otherwise than the model does, store experts one by one that
the model stacks, or split what the model joins. transformers 5 describes this by an ordered list
of rules per architecture, which it applies when it loads a checkpoint. Here, the same rules are
applied to one tensor at a time.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from hisvd_cli.utils.errors import SourceError, reason

if TYPE_CHECKING:
    from torch import Tensor

    from hisvd_cli.modeling.sources.weights import Weights


class Structure(Protocol):
    """What the rules read of a model, which need not be in the form of transformers itself."""

    config: Any
    base_model_prefix: str

    def named_modules(self) -> Iterator[tuple[str, Any]]:
        """Yield its modules by name."""
        ...

    def get_parameter(self, name: str) -> Tensor:
        """Return a tensor in the shape that transformers gives it."""
        ...


_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Converted:
    """A tensor of the model that is computed from tensors on disk.

    Attributes:
        name: in the model.
        first: name of the first tensor that the rule makes.
        parts: pattern of a rule → names on disk, in order.
        rule: the rule, without tensors.
        model: for rules that read sizes from its config.
    """

    name: str
    first: str
    parts: Mapping[str, tuple[str, ...]]
    rule: Any
    model: Structure = field(repr=False)

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of all tensors on disk that are read."""
        return tuple(name for names in self.parts.values() for name in names)

    def read(self, weights: Weights) -> Tensor:
        """Read the tensors on disk and apply the rule. Raises SourceError, NumericalError."""
        return self._apply(weights, self.parts)

    def read_expert(self, weights: Weights, index: int, count: int) -> Tensor:
        """Return slice ``index`` of a stack of ``count``; other experts are not read if each is
        stored separately. Raises SourceError, NumericalError."""
        lone = {
            pattern: (names[index],) for pattern, names in self.parts.items() if len(names) == count
        }
        if len(lone) == len(self.parts) and count > 1:
            found = self._apply(weights, lone)
            if len(found) == 1:
                return found[0]
        return self.read(weights)[index]

    def missing_expert(self, count: int) -> str | None:
        """Return the name of a tensor that is missing on disk, in a stack of ``count`` experts that
        are stored separately; None if the stack is complete."""
        for names in self.parts.values():
            if 1 < len(names) < count:
                numbered = [_NUMBER.split(name) for name in names]
                for place in range(1, len(numbered[0]), 2):
                    found = {parts[place] for parts in numbered}
                    left = [str(i) for i in range(count) if str(i) not in found]
                    if len(found) == len(names) and left:
                        first = numbered[0]
                        return "".join([*first[:place], left[0], *first[place + 1 :]])
        return None

    def _apply(self, weights: Weights, parts: Mapping[str, tuple[str, ...]]) -> Tensor:
        rule = copy.deepcopy(self.rule)
        for pattern, names in parts.items():
            for name in names:
                rule.add_tensor(self.first, name, pattern, weights.read(name))
        try:
            made = rule.convert(self.first, model=self.model, config=self.model.config)
            tensor = made[self.name]
        except (ValueError, RuntimeError, KeyError, IndexError, TypeError) as error:
            raise SourceError(
                f"{self.name} cannot be made from {', '.join(self.stored[:3])}: {reason(error)}",
                "The files are incomplete or of another architecture: download the model again.",
            ) from error
        result: Tensor = tensor[0] if isinstance(tensor, list) else tensor
        return result


@dataclass(frozen=True)
class Conversion:
    """How the tensors on disk become those of a model.

    Attributes:
        renamed: name in the model → name on disk.
        converted: name in the model → tensors and rule that make it.
    """

    renamed: dict[str, str]
    converted: dict[str, Converted]


def convert_names(
    model: Structure, wanted: Collection[str], stored: Mapping[str, str]
) -> Conversion:
    """Apply the rules of transformers to names on disk.

    Args:
        model: the model, with the structure that transformers builds.
        wanted: names of its tensors.
        stored: name without the parts of wrappers → name on disk.
    """
    rules = conversion_rules(model)
    renamed: dict[str, str] = {}
    groups: dict[str, dict[str, list[str]]] = {}
    rule_of: dict[str, Any] = {}
    if not rules:
        return Conversion({}, {})
    from transformers.core_model_loading import dot_natural_key

    renamings, converters, rename = rules
    known = dict.fromkeys(wanted, True)
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = rename(name, [], [], model.base_model_prefix, known)
        if target not in known:
            continue
        if pattern is None:
            renamed.setdefault(target, stored[name])
        else:
            rule_of[target] = by_pattern[pattern]
            groups.setdefault(target, {}).setdefault(pattern, []).append(stored[name])
    converted: dict[str, Converted] = {}
    for first, parts in groups.items():
        fixed = {pattern: tuple(names) for pattern, names in parts.items()}
        for name in _targets(first, rule_of[first]):
            converted[name] = Converted(name, first, fixed, rule_of[first], model)
    return Conversion(renamed, converted)


def conversion_rules(model: Structure) -> tuple[list[Any], list[Any], Any] | None:
    """Return renamings, converters and the function that applies them; None if there are none.

    transformers 4 has no such rules.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError:
        return None
    rules = get_model_conversion_mapping(model)  # type: ignore[arg-type]  # duck-typed
    return (
        [rule for rule in rules if isinstance(rule, WeightRenaming)],
        [rule for rule in rules if isinstance(rule, WeightConverter)],
        rename_source_key,
    )


def _targets(first: str, rule: Any) -> list[str]:
    """Return the names of all tensors that a rule makes; ``first`` is that of its first target."""
    head = rule.target_patterns[0]
    if len(rule.target_patterns) == 1 or head not in first:
        return [first]
    return [first.replace(head, target, 1) for target in rule.target_patterns]


def note_rules(model: Any, stored: Iterable[str], made: Collection[str]) -> None:
    """Have a model save in the layout of files that it would be loaded from.

    Rules that drop a part of names cannot be reversed unless it is known that they applied.

    Args:
        model: the model in the form of transformers.
        stored: names in the files.
        made: names in the model of tensors that these files lack, and that are saved too.
    """
    rules = conversion_rules(model)
    if rules is None:
        return
    renamings, converters, rename = rules
    known = [rename(name, renamings, converters)[0] for name in stored]
    used = [rule for rule in renamings if rule.was_used() or _applies_to(rule, made, known)]
    model._weight_conversions = [*used, *converters]


def _applies_to(rule: Any, made: Collection[str], known: Collection[str]) -> bool:
    """Return whether a renaming that did not apply to the tensors ``known`` makes some of ``made``
    alone."""
    back = rule.reverse_transform()
    return _matches(back, made) and not _matches(back, known)


def _matches(rule: Any, names: Iterable[str]) -> bool:
    return any(rule.rename_source_key(name)[1] is not None for name in names)


def original_groups(model: Any, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the groups of tensors that the rules make from others on disk.

    Args:
        model: the model in the form of transformers.
        names: names of its tensors.
    """
    rules = conversion_rules(model)
    if rules is None:
        return []
    from transformers.core_model_loading import apply_converters

    converters = [rule.reverse_transform() for rule in reversed(rules[1])]
    groups: dict[tuple[str, int], list[str]] = {}
    for name in names:
        target, pattern = apply_converters(name, converters)
        if pattern is not None:
            rule = next(i for i, c in enumerate(converters) if pattern in c.source_patterns)
            groups.setdefault((target, rule), []).append(name)
    return [tuple(group) for group in groups.values()]


def original_tensors(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a model as they are on disk: one group of :func:`original_groups`."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))
