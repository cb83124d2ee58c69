"""Reads the text of the demo model and splits its chapters into four parts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

VERSE = re.compile(r"(?P<chapter>[1-3]?[A-Za-z]+\d+):\d+ (?P<text>.+)")


@dataclass(frozen=True)
class Corpus:
    """Disjoint parts of the text, except that ``calibration`` is a part of ``training``.

    Two thirds of the chapters held out for evaluation are unused, so that an evaluation takes
    seconds.
    """

    training: str
    calibration: str
    validation: str
    evaluation: str


def read_chapters(path: Path) -> list[str]:
    """Return the chapters of a text with one verse per line, in order."""
    chapters: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        verse = VERSE.fullmatch(line)
        if verse is None:
            raise ValueError(f"{path}: not a verse: {line!r}")
        chapters.setdefault(verse["chapter"], []).append(verse["text"])
    return ["\n".join(verses) for verses in chapters.values()]


def split(chapters: list[str]) -> Corpus:
    """Split the chapters by position, so that every part contains text of the whole book."""

    def join(chosen: list[str]) -> str:
        return "\n\n".join(chosen) + "\n"

    evaluation = [c for i, c in enumerate(chapters) if i % 78 == 13]
    validation = [c for i, c in enumerate(chapters) if i % 52 == 0]
    training = [(i, c) for i, c in enumerate(chapters) if i % 26 != 13 and i % 52 != 0]
    return Corpus(
        training=join([c for _, c in training]),
        calibration=join([c for i, c in training if i % 5 == 2]),
        validation=join(validation),
        evaluation=join(evaluation),
    )


def write_texts(folder: Path, corpus: Corpus) -> None:
    """Write the two texts that are shipped with hisvd."""
    (folder / "calibration.txt").write_text(corpus.calibration, encoding="utf-8")
    (folder / "evaluation.txt").write_text(corpus.evaluation, encoding="utf-8")
