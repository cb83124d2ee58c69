"""Derives tensor names from the module state of an unpickled model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hisvd_cli.modeling.pickles.records import Node, RefusedError, Tensor, clean

_MAX_DEPTH = 500
_MAX_NAME = 1000
_MAX_VISITS = 5_000_000
_FREE_VISITS, _VISITS_PER_OPERATION = 10_000, 4
"""Limits of visited objects; shared objects are visited once per name."""
_MAX_CHARACTERS = 1 << 27
_WRAPPERS = ("model", "state_dict", "model_state_dict")


@dataclass(frozen=True, slots=True)
class _Visit:
    name: str
    value: object
    depth: int = 0
    module: bool = False  # visited again under other names, as shared submodules are
    extra: bool = False  # an attribute: tensors that are already listed are skipped


class TensorWalk:
    """Names all tensors below a root: parameters, buffers and submodules first, then attributes."""

    def __init__(self, root: object, operations: int) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.classes: dict[str, str] = {}
        self.problems: list[str] = []
        self._repeats: dict[str, int] = {}
        self._listed: set[int] = set()  # tensors by identity, because records are not hashed
        self._seen: set[int] = set()
        self._later: deque[_Visit] = deque()
        self._run(root, min(_MAX_VISITS, _FREE_VISITS + _VISITS_PER_OPERATION * operations))

    def _run(self, root: object, limit: int) -> None:
        stack = [_Visit("", root, module=True)]
        visits = deep = characters = 0
        while stack or self._later:
            visit = stack.pop() if stack else self._later.popleft()
            visits += 1
            if visits > limit:
                raise RefusedError(f"more than {limit:,} objects, or a circular reference")
            if visit.depth > _MAX_DEPTH:
                deep += 1
                continue
            children = list(self._children(visit))
            characters += sum(len(child.name) for child in children)
            if characters > _MAX_CHARACTERS:
                raise RefusedError(f"its names have more than {_MAX_CHARACTERS:,} characters")
            stack += reversed(children)
        if deep:
            self.problems.append(
                f"{deep} objects are nested more than {_MAX_DEPTH} levels: ignored"
            )

    def _children(self, visit: _Visit) -> Iterator[_Visit]:
        value = visit.value
        if isinstance(value, Tensor):
            self._add(visit.name or "tensor", value, visit.extra)
        if id(value) in self._seen and not visit.module:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            yield from _states(visit, value)
        elif isinstance(value, tuple):
            yield from _below(visit, enumerate(value))
        elif isinstance(value, Node):
            fields = _fields(value)
            if all(isinstance(fields.get(name), Node) for name in ("_parameters", "_modules")):
                yield from self._module(visit, value, fields)
            else:
                yield from _object(visit, value)

    def _module(self, visit: _Visit, node: Node, fields: dict[object, object]) -> Iterator[_Visit]:
        self.classes[visit.name] = node.kind
        for name in ("_parameters", "_buffers", "_modules"):
            yield from _below(visit, _entries(fields.pop(name, None)), module=name == "_modules")
        self._later.extend(_below(visit, fields.items(), extra=True))

    def _add(self, name: str, tensor: Tensor, extra: bool) -> None:
        if extra and id(tensor) in self._listed:
            return
        self._listed.add(id(tensor))
        if name in self.tensors:
            self._repeats[name] = self._repeats.get(name, 1) + 1
            name = f"{name}#{self._repeats[name]}"
        self.tensors[name] = tensor


def _object(visit: _Visit, node: Node) -> Iterator[_Visit]:
    """Yield the content of a container or an instance."""
    for key, value in _entries(node):
        if visit.depth == 0 and key in _WRAPPERS and isinstance(value, Node):
            yield _Visit("", value, 1, module=True)
        else:
            yield from _below(visit, [(key, value)])
    yield from _below(visit, enumerate(node.items or ()))
    yield from _below(visit, enumerate(node.args), extra=True)
    yield from _states(visit, node)


def _below(
    visit: _Visit,
    pairs: Iterable[tuple[object, object]],
    *,
    module: bool = False,
    extra: bool = False,
) -> Iterator[_Visit]:
    for key, value in pairs:
        if _may_hold_tensors(value):
            name = _joined(visit.name, key)
            yield _Visit(name, value, visit.depth + 1, module, extra or visit.extra)


def _states(visit: _Visit, holder: Node | Tensor) -> Iterator[_Visit]:
    for part in _state_parts(holder):
        if _may_hold_tensors(part):
            yield _Visit(visit.name, part, visit.depth + 1, extra=True)


def _state_parts(holder: Node | Tensor) -> Iterator[object]:
    for state in holder.states or ():
        yield from state if isinstance(state, tuple) else (state,)  # (__dict__, slots)


def _may_hold_tensors(value: object) -> bool:
    if isinstance(value, tuple):
        return any(isinstance(item, Node | Tensor | tuple) for item in value)
    return isinstance(value, Node | Tensor)


def _entries(value: object) -> list[tuple[object, object]]:
    return (value.entries or []) if isinstance(value, Node) else []


def _fields(node: Node) -> dict[object, object]:
    """Return an instance's attributes."""
    pairs = [pair for part in _state_parts(node) for pair in _entries(part)]
    return {key: value for key, value in pairs if isinstance(key, str)}


def _joined(prefix: str, key: object) -> str:
    if isinstance(key, str):
        part = clean(key)
    elif isinstance(key, int) and abs(key) < 1 << 63:
        part = str(key)
    else:
        part = f"<{type(key).__name__}>"
    return f"{prefix}.{part}"[-_MAX_NAME:] if prefix else part
