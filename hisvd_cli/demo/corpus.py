"""The text of the demo model: read by chapters and split into four parts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

VERSE = re.compile(r"(?P<chapter>[1-3]?[A-Za-z]+\d+):\d+ (?P<text>.+)")


@dataclass(frozen=True)
class Corpus:
    """The text, cut by whole chapters; ``calibration`` is part of ``training``, nothing else is.

    Two thirds of the chapters held out for evaluation are unused: the rest takes seconds to
    evaluate.
    """

    training: str
    calibration: str
    validation: str
    evaluation: str


def read_chapters(path: Path) -> list[str]:
    """Return the chapters of a one-verse-a-line text in order, their verses one a line."""
    chapters: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        verse = VERSE.fullmatch(line)
        if verse is None:
            raise ValueError(f"{path}: not a verse: {line!r}")
        chapters.setdefault(verse["chapter"], []).append(verse["text"])
    return ["\n".join(verses) for verses in chapters.values()]


def split(chapters: list[str]) -> Corpus:
    """Cut the chapters into four texts by their position, so that every text sees every book."""

    def join(chosen: list[str]) -> str:
        return "\n\n".join(chosen) + "\n"

    evaluation = [c for i, c in enumerate(chapters) if i % 78 == 13]
    validation = [c for i, c in enumerate(chapters) if i % 52 == 0]
    seen = [(i, c) for i, c in enumerate(chapters) if i % 26 != 13 and i % 52 != 0]
    return Corpus(
        training=join([c for _, c in seen]),
        calibration=join([c for i, c in seen if i % 5 == 2]),
        validation=join(validation),
        evaluation=join(evaluation),
    )


def write_texts(folder: Path, corpus: Corpus) -> None:
    """Write the two texts that are shipped with the model."""
    (folder / "calibration.txt").write_text(corpus.calibration, encoding="utf-8")
    (folder / "evaluation.txt").write_text(corpus.evaluation, encoding="utf-8")
