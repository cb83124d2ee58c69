"""What comes out for an architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["works", "refused", "fails", "not built", "out of scope"]


@dataclass(frozen=True)
class Result:
    """What came out for one architecture.

    Attributes:
        state: the outcome.
        step: the first failing step, empty if it works.
        sentence: why, empty if it works.
        best: why the preset ``best`` is refused, empty if it works too.
        covered: share of the blocks' matrices that were open to compression, 0 to 1.
    """

    state: State
    step: str = ""
    sentence: str = ""
    best: str = ""
    covered: float = 0.0
