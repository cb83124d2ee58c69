"""The settings of each command, which are flags on the command line and keywords in Python."""

from __future__ import annotations

from hisvd_cli.pipelines.config.settings import SECTIONS

Key = tuple[str, str]


def keys_of(*sections: str, without: str = "") -> tuple[Key, ...]:
    """Return (section, key) of every setting of ``sections``, except keys named ``without``."""
    return tuple(
        (section, key)
        for section in sections
        for key in SECTIONS[section].model_fields
        if key != without
    )


SETTINGS: dict[str, tuple[Key, ...]] = {
    "calibrate": keys_of("model", "calibration"),
    "plan": (
        *keys_of("plan"),
        ("quantize", "method"),
        ("quantize", "group_size"),
        *keys_of("model", "calibration"),
    ),
    "compress": (
        *keys_of("plan", "compress", "recover", "quantize", "model", "calibration"),
        ("eval", "windows"),
    ),
    "evaluate": (*keys_of("eval"), *keys_of("model", without="name")),
    "inspect": (("model", "revision"), ("model", "trust_remote_code")),
    "convert": (
        ("compress", "max_shard_size"),
        *keys_of("quantize"),
        *(("calibration", key) for key in ("dataset", "samples", "seqlen", "seed", "batch")),
        ("model", "device"),
        ("model", "dtype"),
        ("model", "scratch"),
    ),
    "load": tuple(
        ("model", key) for key in ("revision", "trust_remote_code", "device", "dtype", "scratch")
    ),
}
"""Command → (section, key) of its settings, in the order of ``--help``."""
SEVERAL: dict[Key, tuple[str, ...]] = {
    ("plan", "ratio"): ("plan", "compress"),
    ("plan", "preset"): ("compress",),
    ("plan", "allocator"): ("plan",),
}
"""Settings with several values of which some commands, and all functions in Python, accept one →
the commands that accept several."""
