"""What the rules of ``sizes`` do not know: settings of single types, and types left out."""

from __future__ import annotations

from typing import Any

NO_TEXT_DECODER: dict[str, str] = {
    "bert-generation": "An encoder: a decoder only with is_decoder in its configuration.",
    "trocr": "The decoder of an encoder-decoder model.",
    "musicgen": "A decoder of audio codes, which needs the states of an encoder.",
    "musicgen_melody": "A decoder of audio codes, which needs the states of an encoder.",
    "moshi": "A decoder of text and audio codes together.",
    "pi0": "A model of robot actions, not of text.",
    "diffusion_gemma": "A block diffusion model: it does not predict the next token.",
}

Settings = dict[str, Any]
OVERRIDES: dict[str, Settings] = {}
