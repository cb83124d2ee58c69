"""Colours, markers and line styles of the page and its figures.

Lines use the blue, vermillion, green and purple of Okabe and Ito, which remain distinguishable with
colour-vision deficiency; the last two are darkened for contrast on white.
"""

from __future__ import annotations

BACKGROUND = "#ffffff"
PANEL = "#f3f5f7"
TEXT = "#1b1f24"
MUTED = "#4d5660"
LINK = "#00568a"
LINE = "#767f89"
SERIES = ("#0072b2", "#c44f00", "#007d5c", "#9c4a7c", "#1b1f24", "#7a6200")
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours as WCAG 2 defines it, from 1 to 21."""
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def ink_on(colour: str) -> str:
    """Return black or white, whichever has more contrast with a colour."""
    return max("#000000", "#ffffff", key=lambda ink: contrast(ink, colour))


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
