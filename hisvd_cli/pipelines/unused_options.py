"""Options that have no effect, because the method that they belong to is not chosen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from hisvd_cli.allocation.methods import ALLOCATORS
from hisvd_cli.allocation.plan import Plan
from hisvd_cli.compression.corrections import BY_GRADIENT
from hisvd_cli.compression.methods import DECOMPOSERS
from hisvd_cli.pipelines.config.commands import Key
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.config.settings import SECTIONS, Settings, methods_of
from hisvd_cli.pipelines.planning.byte_budgets import ALLOCATOR, bytes_ratio, rounded_by
from hisvd_cli.pipelines.planning.methods import measures
from hisvd_cli.utils.errors import UsageError

_CHECKED = {
    "plan": ("plan", "quantize"),
    "compress": ("plan", "compress", "recover", "quantize"),
    "recover": ("recover",),
    "convert": ("quantize",),
    "evaluate": ("eval",),
}
"""Command → the sections whose options are checked; ``recover`` is ``compress --from``."""


@dataclass(frozen=True)
class _Chosen:
    """The chosen methods.

    Attributes:
        settings: the settings, of one preset and ratio.
        allocators: the allocators.
        bits: bits of the quantization, or ``bytes`` if a plan chooses them.
        needs_bytes: whether the command quantizes for a bytes ratio only.
    """

    settings: Settings
    allocators: Sequence[str]
    bits: str
    needs_bytes: bool


def check_options(
    resolved: Resolved,
    command: str,
    plan: Plan | None = None,
    given: Collection[Key] | None = None,
) -> None:
    """Check that every option given by flag or keyword belongs to a chosen method. Settings of a
    profile, the environment or a preset may belong to others, and are ignored.

    Args:
        resolved: the settings; of several presets and ratios, one must use the option.
        command: the command, or ``recover``.
        plan: the given plan, which decides all settings of planning.
        given: the settings given by keyword; by default those given by flag.

    Raises:
        UsageError: an option has no effect.
    """
    by_bytes = bytes_ratio(resolved) is not None if plan is None else plan.bytes is not None
    cells = [_chosen(cell, command, plan, by_bytes) for cell in resolved.cells()]
    for section in _CHECKED[command]:
        if section == "plan" and plan is not None:
            continue  # any setting of it is an error of its own
        for key in SECTIONS[section].model_fields:
            own = given is None or (section, key) in given
            if own and resolved.is_flag(section, key):
                needed = [_NEEDED[section](key, cell) for cell in cells]
                if all(needed):
                    raise _unused(resolved, section, key, needed[0])


def _unused(resolved: Resolved, section: str, key: str, needed: str) -> UsageError:
    off = "no " if resolved.value(section, key) is False else ""
    setting = f"`{off}{section}.{key}`"
    return UsageError(
        f"{setting} has no effect without {needed}.", f"Give {needed}, or leave out {setting}."
    )


def _chosen(resolved: Resolved, command: str, plan: Plan | None, by_bytes: bool) -> _Chosen:
    settings = rounded_by(resolved, plan).settings if plan else resolved.settings
    allocators = [ALLOCATOR] if by_bytes else settings.plan.allocator
    bits: str = settings.quantize.bits
    if command == "convert" and not resolved.is_flag("quantize", "bits"):
        bits = "none"  # those of a profile are for compress
    return _Chosen(settings, allocators, "bytes" if by_bytes else bits, command == "plan")


def _of_plan(key: str, chosen: _Chosen) -> str:
    if key == "probe_samples":
        able = [name for name in ALLOCATORS.declared() if measures(name)]
    elif key in ("input_shrinkage", "output_shrinkage"):
        fisher = chosen.settings.plan.metric in ("fisher", "held-out")
        used = fisher or DECOMPOSERS.takes(chosen.settings.compress.decomposer, key)
        return "" if used else "`plan.metric` fisher or held-out"
    else:
        able = methods_of("plan", key)
    used = not able or bool({*able} & {*chosen.allocators})
    return "" if used else f"`plan.allocator` {_any_of(able)}"


def _of_compress(key: str, chosen: _Chosen) -> str:
    settings = chosen.settings.compress
    if methods := methods_of("compress", key):
        used = DECOMPOSERS.takes(settings.decomposer, key)
        return "" if used else f"`compress.decomposer` {_any_of(methods)}"
    if key == "update_damping":
        used = settings.update != "none"
        return "" if used else "`compress.update` closed-form or propagated"
    if not key.startswith("correction"):
        return ""
    if settings.stages == 1:
        return "`compress.stages` 2 or more"
    able = _CORRECTIONS.get(key, [settings.correction])
    return "" if settings.correction in able else f"`compress.correction` {_any_of(able)}"


_CORRECTIONS: dict[str, list[str]] = {
    "correction_samples": sorted(BY_GRADIENT),
    "correction_batches": ["pull-subspace"],
    "correction_alpha": ["alpha-blend"],
    "correction_step": ["gradient-step"],
}


def _of_recover(key: str, chosen: _Chosen) -> str:
    able = ["distill", "lora"]
    if key.startswith("lora_"):
        able = ["lora"]
    elif key == "temperature":
        able = ["distill"]
    used = key == "method" or chosen.settings.recover.method in able
    return "" if used else f"`recover.method` {_any_of(able)}"


def _of_quantize(key: str, chosen: _Chosen) -> str:
    if key == "bits":
        return ""
    if chosen.bits == "none" or (chosen.needs_bytes and chosen.bits != "bytes"):
        return "`plan.bytes_ratio`" if chosen.needs_bytes else "`quantize.bits` int8 or int4"
    if key == "damping":
        return "" if chosen.settings.quantize.method == "gptq" else "`quantize.method` gptq"
    able = {"group_size": ("int4", "bytes"), "dense": ("int4",)}.get(key, (chosen.bits,))
    return "" if chosen.bits in able else "`quantize.bits` int4"


def _of_eval(key: str, chosen: _Chosen) -> str:
    settings = chosen.settings.eval
    if key in ("batch_sizes", "prompt_tokens", "new_tokens", "turns", "compile"):
        return "" if settings.efficiency else "`eval.efficiency`"
    if key in ("num_fewshot", "limit", "task_path"):
        return "" if settings.tasks else "`eval.tasks`"
    return ""


_NEEDED: dict[str, Callable[[str, _Chosen], str]] = {
    "plan": _of_plan,
    "compress": _of_compress,
    "recover": _of_recover,
    "quantize": _of_quantize,
    "eval": _of_eval,
}
"""Section → a function that returns what one of its options requires and is not chosen; empty if
the option has an effect."""


def _any_of(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
