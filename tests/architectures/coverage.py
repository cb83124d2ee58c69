"""``coverage.json``: what came out for each architecture, from which the manual's table is made."""

from __future__ import annotations

import json
from pathlib import Path

import transformers

from tests.architectures.registry import architectures
from tests.architectures.results import Result

FILE = Path(__file__).with_name("coverage.json")


def read(file: Path = FILE) -> dict[str, Result]:
    """Return type → result, empty if nothing was written yet."""
    if not file.is_file():
        return {}
    document = json.loads(file.read_text(encoding="utf-8"))
    known = Result.__dataclass_fields__
    return {
        name: Result(**{key: value for key, value in each.items() if key in known})
        for name, each in document["architectures"].items()
    }


def write(results: dict[str, Result], file: Path = FILE) -> None:
    """Write results, sorted, those that are empty left out; one line for each architecture."""
    lines = []
    for name, each in sorted(results.items()):
        about = architectures()[name]
        entry = {"class": about.class_name, "kind": about.kind, **vars(each)}
        kept = {key: value for key, value in entry.items() if value not in ("", 0.0)}
        lines.append(f"{json.dumps(name)}: {json.dumps(kept, ensure_ascii=False)}")
    version = json.dumps(transformers.__version__)
    text = ",\n    ".join(lines)
    file.write_text(
        f'{{\n  "transformers": {version},\n  "architectures": {{\n    {text}\n  }}\n}}\n',
        encoding="utf-8",
    )


def version(file: Path = FILE) -> str | None:
    """Return the version of transformers that the results are of, None if there are none."""
    if not file.is_file():
        return None
    found: str = json.loads(file.read_text(encoding="utf-8"))["transformers"]
    return found
