"""Damage for files, drawn by Hypothesis: bytes that flip or are lost, values that are odd."""

from __future__ import annotations

import copy
import io
import json
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

_DEEP = "\0deep\0"
"""Stands in a document for a list that json itself could not write."""
_ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 10**9, 10**12, 2**63, 10**30, -(10**30), 1e-320, 1e308),
    *(float("nan"), float("inf"), 0.5, "", "3", "\ud800", "\0", "../x", "/etc/passwd", "x" * 5000),
    *([], [[]], {}, {"": 3}, [None], ["a", 1], {"model": 3}, _DEEP, "é\n\x1b[31m", "float32"),
]
_WORDS = [b"\0" * 8, b"\xff" * 8, struct.pack("<Q", 1 << 60), struct.pack("<Q", 1 << 31), b"[" * 8]
Mutate = Callable[[bytes, Any], bytes]
"""Takes the content of a file, and Hypothesis' way to draw; returns what is written instead."""


def mutated_bytes(content: bytes, draw: Any, end: int | None = None) -> bytes:
    """Cut a file, or put other bytes at a few places before ``end``."""
    end = min(len(content), end or len(content))
    if end == 0 or draw(st.integers(0, 4)) == 0:
        return content[: draw(st.integers(0, len(content)))]
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, end - 1))
        piece = draw(st.one_of(st.sampled_from(_WORDS), st.binary(min_size=1, max_size=4)))
        if draw(st.booleans()):
            data[at : at + len(piece)] = piece
        else:
            data[at:at] = piece
    return bytes(data)


def mutated_head(content: bytes, draw: Any) -> bytes:
    """Put other bytes where a binary file describes what follows."""
    return mutated_bytes(content, draw, 600)


def mutated_json(content: bytes, draw: Any) -> bytes:
    """Replace one or two values of a JSON document, rename a key or remove it."""
    if draw(st.integers(0, 5)) == 0:
        return mutated_bytes(content, draw)
    document = json.loads(content)
    for _ in range(draw(st.integers(1, 2))):
        document = _changed(document, draw)
    return _text(document)


def mutated_lines(content: bytes, draw: Any) -> bytes:
    """Do the same to one line of JSON lines."""
    lines = content.splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = mutated_json(lines[at], draw)
    return b"\n".join(lines)


def mutated_header(content: bytes, draw: Any) -> bytes:
    """Do the same to the header of a safetensors file, with or without the bytes behind it."""
    (length,) = struct.unpack("<Q", content[:8])
    header = mutated_json(content[8 : 8 + length], draw)
    said = draw(st.sampled_from([len(header), len(header), length, 0, 1 << 60]))
    return struct.pack("<Q", said) + header + content[8 + length :]


def mutated_archive(content: bytes, draw: Any) -> bytes:
    """Put other bytes into the pickle of a ``.pt`` file, whose checksums are right again."""
    if draw(st.integers(0, 3)) == 0:
        return mutated_bytes(content, draw)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                data = mutated_bytes(data, draw)
            new.writestr(entry.filename, data)
    return made.getvalue()


def _text(document: object) -> bytes:
    deep = "[" * 3000 + "]" * 3000
    text = json.dumps(document).replace(json.dumps(_DEEP), deep)
    return text.encode()


def _changed(document: Any, draw: Any) -> Any:
    """Return a copy with one node, drawn on a way down from the root, made odd."""
    document = copy.deepcopy(document)
    node = document
    while isinstance(node, dict | list) and node:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw(st.sampled_from(keys))
        inner = node[key]
        if isinstance(inner, dict | list) and inner and draw(st.integers(0, 5)):
            node = inner
            continue
        kind = draw(st.integers(0, 9))
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[draw(st.sampled_from(["", "x", "ranks", "__metadata__"]))] = node.pop(key)
        else:
            node[key] = draw(st.sampled_from(_ODD))
        return document
    return draw(st.sampled_from(_ODD))
