"""Keeps the tensors of replaced layers out of transformers' conversion rules.

transformers 5 renames, merges, splits and transposes tensors while it loads and saves a model, by
patterns over their names. A pattern for the stack ``mlp.experts.gate_up_proj`` also matches its
factor ``mlp.experts.gate_up_proj.weight``, and one for ``q_proj.weight`` matches V of that layer.
Factors are stored under the names of the model instead, to which no rule applies.

This file is copied into every checkpoint (see ``transformers_plugin.remote_code_files``), so it
only imports transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class _Except:
    """A compiled pattern that does not match certain names.

    Args:
        pattern: the pattern.
        names: the names, as the rule of the pattern sees them.
    """

    def __init__(self, pattern: re.Pattern[str], names: frozenset[str]) -> None:
        self.pattern = pattern
        self.names = names
        self.groupindex = pattern.groupindex

    def __deepcopy__(self, memo: dict[int, Any]) -> _Except:
        return self  # transformers copies a rule for every tensor, and there may be many names

    def __reduce__(self) -> tuple[Any, ...]:
        return _Except, (self.pattern, self.names)  # groupindex cannot be pickled

    def search(self, name: str) -> re.Match[str] | None:
        """Return the match of the pattern, or None for the exceptions."""
        return None if name in self.names else self.pattern.search(name)


class Reversed:
    """A rule whose reverse does not apply to certain names.

    Args:
        rule: a rule of transformers.
        names: names of tensors in the model.
    """

    def __init__(self, rule: Any, names: frozenset[str]) -> None:
        self.rule = rule
        self.names = names

    def reverse_transform(self) -> Any:
        """Return the reverse, as transformers asks for it when it saves a model."""
        return excepted(self.rule.reverse_transform(), self.names)


def excepted(rule: Any, names: frozenset[str]) -> Any:
    """Change a rule so that it does not apply to certain names, and return it.

    Args:
        rule: a rule of transformers; one that is limited to a part of the model sees names
            without the prefix of that part.
        names: names of tensors in the model.
    """
    pattern = rule.compiled_sources
    if isinstance(pattern, _Except):  # transformers reuses rules within a process
        pattern = pattern.pattern
    seen = names
    if rule.scope_prefix is not None:
        inner = f"{rule.scope_prefix}." if rule.scope_prefix else ""
        outer = f"{rule.base_model_prefix}." if rule.base_model_prefix else ""
        seen = frozenset(
            name.removeprefix(prefix)
            for prefix in (outer + inner, inner)
            for name in names
            if name.startswith(prefix)
        )
    rule.compiled_sources = _Except(pattern, seen)
    return rule


def with_and_without(prefix: str, names: Iterable[str]) -> frozenset[str]:
    """Return names with and without the prefix of the base model.

    A model may have been saved with a head and be loaded without one, or vice versa.
    """
    dotted = f"{prefix}."
    known = [form for name in names for form in (name, name.removeprefix(dotted))]
    return frozenset(known + [dotted + name for name in known])


@contextmanager
def saved_as_named(model: Any, names: Iterable[str]) -> Iterator[None]:
    """While active, ``save_pretrained`` writes certain tensors of a model under their own names.

    Args:
        model: a model of transformers; version 4 has no conversion rules.
        names: names of tensors in the model.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange
    except ImportError:
        yield
        return
    rules = before = getattr(model, "_weight_conversions", None)
    if rules is None:  # built from a config instead of loaded: the rules that transformers takes
        rules = get_model_conversion_mapping(model, add_legacy=False)
        rules = [rule for rule in rules if not isinstance(rule, PrefixChange)]
    kept = frozenset(names)
    model._weight_conversions = [Reversed(rule, kept) for rule in rules]
    try:
        yield
    finally:
        model._weight_conversions = before
