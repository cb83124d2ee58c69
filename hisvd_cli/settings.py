"""Every setting, once: its default, its bounds, and what ``--help`` says of it.

A field of a section is a key of ``hisvd.toml``, a flag, and an environment variable
``HISVD_<SECTION>_<KEY>``.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_serializer,
)

from hisvd_cli.memory_bounds import checked


def _as_list(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


def _none_or_list(value: object) -> object:
    return [] if value is None else _as_list(value)


def _once(values: list[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _words(value: object) -> object:
    """Take commas in each text of a list apart, as lm-eval's command line does."""
    items = value if isinstance(value, list | tuple) else [value]
    texts = (item.split(",") if isinstance(item, str) else [item] for item in items)
    return [item.strip() if isinstance(item, str) else item for part in texts for item in part]


def _setting(
    default: Any,
    text: str,
    flag: str = "",
    *,
    panel: str = "",
    choices: Sequence[str] = (),
    **bounds: Any,
) -> Any:
    """Return a field.

    Args:
        default: its default.
        text: what ``--help`` says of it.
        flag: its flag, where that is not the key's name.
        panel: its panel in ``--help``, where that is not its section's.
        choices: values that completion offers, where others may be allowed too.
        bounds: what pydantic checks.
    """
    extra: dict[str, Any] = {"flag": flag, "panel": panel, "choices": list(choices)}
    return Field(default, description=text, json_schema_extra=extra, **bounds)


_ALLOCATORS = "Knobs of allocators"
_DECOMPOSERS = "Knobs of decomposers"
_TASKS = "Tasks (lm-eval)"
_EFFICIENCY = "Efficiency"

PresetName = Literal[
    "hisvd",
    "svd-llm",
    "svd-llm-v2",
    "rsvd-llm",
    "asvd",
    "fwsvd",
    "gfwsvd",
    "zs-svd",
    "lems",
    "swift-svd",
    "dobi-svd",
    "best",
]
# The methods that hisvd brings, written out so that help and completion need no torch. Another
# package may bring more, so neither is a Literal.
ALLOCATOR_NAMES = (
    *("hisvd", "uniform", "svdllm-v2", "asvd", "zero-sum", "swift", "lems"),
    *("waterfill", "learned"),
)
DECOMPOSER_NAMES = ("svd", "asvd", "whitened", "fwsvd", "gfwsvd", "fisher", "randomized")


def _any_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


Ratio = Annotated[float, Field(gt=0, le=1)]
Ratios = Annotated[list[Ratio], Field(min_length=1), BeforeValidator(_as_list)]
Names = Annotated[list[str], BeforeValidator(_as_list)]
Presets = Annotated[list[PresetName], BeforeValidator(_none_or_list), AfterValidator(_once)]
Words = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_words)]
Counts = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1), BeforeValidator(_words)]
Memory = Annotated[str, AfterValidator(checked)]
Methods = Annotated[list[str], Field(min_length=1), BeforeValidator(_as_list)]


class Section(BaseModel):
    """A table of the profile; a key that it does not name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSettings(Section):
    """``[model]``: what is worked on, and where."""

    name: str = _setting(
        "", "Hub id, folder, .gguf file, or 'demo', a small model inside hisvd.", "--model"
    )
    revision: str | None = _setting(None, "Branch, tag or commit on the hub.")
    trust_remote_code: bool = _setting(False, "Run the Python code that a model ships.")
    device: str = _setting("auto", "cpu, cuda, cuda:1 or mps; auto takes the GPU if there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "auto",
        "Precision of forward passes: float32, bfloat16 or float16; auto is that of the weights.",
    )
    max_memory: Memory | None = _setting(
        None,
        "Memory to keep to: 3GB (of the machine), or cpu=8GB,cuda=20GB. Hidden states then go to "
        "host memory or a file, and fewer windows through a block at a time, where they must.",
    )


class CalibrationSettings(Section):
    """``[calibration]``: the text that statistics are taken from."""

    dataset: str = _setting(
        "auto",
        "wikitext2, c4, ptb, demo, self (text sampled from the model itself), a hub id, or a .txt "
        ".jsonl .json .parquet file; auto is wikitext2, and demo for the demo model.",
    )
    samples: int = _setting(256, "Windows of text.", ge=1)
    seqlen: int | None = _setting(
        None, "Tokens per window; by default 2048, or the model's positions if fewer.", ge=2
    )
    seed: int = _setting(0, "Which windows are drawn.", ge=0)
    batch: int = _setting(4, "Windows per forward pass.", ge=1)
    gradients: bool = _setting(False, "Also take gradients of the loss, for fisher and the like.")
    weight_gradients: bool = _setting(
        False,
        "Also those of the weights, for zero-sum, fwsvd and gfwsvd; implies --gradients.",
    )
    path: str | None = _setting(
        None, "Folder of the calibration; by default one in the cache.", "--calibration"
    )


class PlanSettings(Section):
    """``[plan]``: how ranks are chosen."""

    ratio: Ratios = _setting([0.8], "Share of the parameters to KEEP: 0.6 keeps 60 %.")
    ratio_of: Literal["sublayers", "model"] = _setting(
        "sublayers", "What the ratio counts: the factored sublayers, or the whole model."
    )
    preset: Presets = _setting(
        [],
        f"Named combination of methods: {_any_of(get_args(PresetName))}. Settings given beside it "
        "win; compress makes several.",
    )
    allocator: Methods = _setting(
        ["hisvd"],
        f"Method that shares the budget: {_any_of(ALLOCATOR_NAMES)}; plan shows several side by "
        "side.",
        choices=ALLOCATOR_NAMES,
    )
    metric: Literal["whitened", "fisher", "held-out", "weight"] = _setting(
        "whitened",
        "In which metric loss is counted: whitened (error of the outputs), fisher (growth of the "
        "model's loss), held-out (the same, on text that the components were not chosen on) or "
        "weight (error of the weights).",
    )
    input_shrinkage: float = _setting(
        0.02, "fisher: how far moments of inputs move towards their mean diagonal.", ge=0, le=1
    )
    output_shrinkage: float = _setting(
        0.1, "fisher: the same for moments of gradients.", ge=0, le=1
    )
    min_rank_ratio: float = _setting(
        0.3, "Smallest rank, as a share of what equal shares would give.", ge=0, lt=1
    )
    multiple_of: int = _setting(1, "Ranks are multiples of this.", ge=1)
    storage: Literal["pair", "pivoted"] = _setting(
        "pair",
        "How a low-rank pair is written: pair (U and V), or pivoted (r rows of the product, and "
        "what makes the others of them: the same product in fewer numbers, so more rank).",
    )
    include: Names = _setting([], "Only sublayers that match this glob of a name or type.")
    exclude: Names = _setting([], "No sublayers that match; they stay dense and uncounted.")
    rank_method: Literal["stable", "effective", "mathematical"] = _setting(
        "stable",
        "hisvd: rank measure of stage 1: stable, effective or mathematical.",
        panel=_ALLOCATORS,
    )
    alpha: float = _setting(
        0.5, "hisvd: exponent of the rank density in stage 1.", panel=_ALLOCATORS, ge=0, le=8
    )
    spectrum: Literal["whitened", "weight"] = _setting(
        "weight",
        "hisvd: spectrum that stage 1 measures: whitened or weight.",
        panel=_ALLOCATORS,
    )
    modulation: Literal["logarithmic", "power", "exponential", "linear"] = _setting(
        "logarithmic",
        "hisvd: form of stage 2's factor: logarithmic, power, exponential or linear.",
        panel=_ALLOCATORS,
    )
    lwe_strength: float = _setting(
        2.0,
        "hisvd: strength β of stage 2; 0 leaves stage 1 as it is.",
        panel=_ALLOCATORS,
        ge=0,
        le=100,
    )
    tail_redundancy_weight: float = _setting(
        30.0, "hisvd: weight of the tail share in stage 2.", panel=_ALLOCATORS, ge=0, le=100
    )
    selection: Literal["zero-sum", "smallest", "negative-sum", "sigma", "loss-order"] = _setting(
        "zero-sum",
        "zero-sum: which component goes next: zero-sum, smallest, negative-sum, sigma or "
        "loss-order.",
        panel=_ALLOCATORS,
    )
    importance_weight: float = _setting(
        0.6, "swift: how much a block's importance counts.", panel=_ALLOCATORS, ge=0, le=1
    )
    sensitivity_ratios: Ratios = _setting(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
        "asvd: kept shares at which each sublayer is measured.",
        panel=_ALLOCATORS,
    )
    probe_ratio: Ratio = _setting(
        0.5, "lems: kept share at which each sublayer is measured.", panel=_ALLOCATORS
    )
    depth_factor: float = _setting(
        5.0,
        "lems: the first block's loss counts 1 plus this, falling evenly to 1 at the last.",
        panel=_ALLOCATORS,
        ge=0,
        le=100,
    )
    probe_samples: int = _setting(
        8,
        "asvd, lems, learned: windows of calibration text to measure on.",
        panel=_ALLOCATORS,
        ge=1,
    )
    learning_start: Literal["uniform", "waterfill"] = _setting(
        "waterfill", "learned: where positions start: uniform or waterfill.", panel=_ALLOCATORS
    )
    learning_steps: int = _setting(
        40, "learned: steps of gradient descent.", panel=_ALLOCATORS, ge=1
    )
    learning_rate: float = _setting(
        0.01, "learned: size of a step, as a share of the full rank.", panel=_ALLOCATORS, gt=0, le=1
    )
    softness: float = _setting(
        0.02,
        "learned: width of a soft mask's edge, as a share of the full rank.",
        panel=_ALLOCATORS,
        gt=0,
        le=1,
    )

    @field_serializer("preset")
    def _one_or_several(self, preset: list[str]) -> str | list[str] | None:
        # Artifacts are made by one preset or by none, and record it as such.
        return preset if len(preset) > 1 else next(iter(preset), None)


class CompressSettings(Section):
    """``[compress]``: how sublayers are factored, and what is written."""

    decomposer: str = _setting(
        "whitened",
        f"Method that factors a sublayer: {_any_of(DECOMPOSER_NAMES)}.",
        choices=DECOMPOSER_NAMES,
    )
    solver: Literal["auto", "eigh", "svd", "partial", "subspace"] = _setting(
        "auto",
        "How a decomposition finds its vectors: eigh (all of them), svd (the same, of the whitened "
        "matrix itself), partial (those that are kept), subspace (nearly those, at most 0.1 % "
        "above the least loss); auto picks by size, rank and device.",
    )
    max_shard_size: float = _setting(5.0, "Largest weight file in GB.", gt=0)
    evaluate: bool | None = _setting(
        None, "Measure perplexity before and after; by default only for the demo model."
    )
    asvd_alpha: float = _setting(
        0.5, "asvd: exponent of the mean absolute input.", panel=_DECOMPOSERS, ge=0, le=8
    )
    weighting: Literal["svd", "asvd", "whitened", "fwsvd", "gfwsvd", "fisher"] = _setting(
        "whitened",
        "randomized: whose weighting: svd, asvd, whitened, fwsvd, gfwsvd or fisher.",
        panel=_DECOMPOSERS,
    )
    oversamples: int = _setting(
        10, "randomized: directions drawn beyond the rank.", panel=_DECOMPOSERS, ge=0
    )
    power_iterations: int = _setting(
        2, "randomized: passes that sharpen the directions.", panel=_DECOMPOSERS, ge=0
    )


class EvalSettings(Section):
    """``[eval]``: how quality is measured."""

    dataset: Names = _setting(
        [],
        "Text, as for calibrate; by default wikitext2's test split, and demo for the demo model.",
    )
    seqlen: int | None = _setting(
        None, "Tokens per window; by default 2048, or the model's positions if fewer.", ge=2
    )
    windows: int = _setting(0, "Only the first so many windows of the text; 0 takes all.", ge=0)
    batch: int = _setting(1, "Windows per forward pass.", ge=1)
    baseline: str | None = _setting(
        None, "Model to hold the others against, named as for --model: adds KL and agreement."
    )
    stream: Literal["auto", "on", "off"] = _setting(
        "auto",
        "Hold one block of a model in memory at a time: on, off, or auto: where its weights do not "
        "fit. The numbers are the same.",
    )
    tasks: Words = _setting(
        [],
        "Tasks that lm-eval runs, with commas between: arc_easy,piqa. Needs the extra: pip install "
        "'hisvd[eval]'.",
        panel=_TASKS,
    )
    num_fewshot: int | None = _setting(
        None, "Examples in front of each question; by default as the task says.", panel=_TASKS, ge=0
    )
    limit: int | None = _setting(
        None, "Only the first so many questions of each task.", panel=_TASKS, ge=1
    )
    task_path: str | None = _setting(
        None, "Folder of tasks of your own, in lm-eval's YAML.", panel=_TASKS
    )
    efficiency: bool = _setting(
        False,
        "Also time prefill and decode, in turns with the baseline.",
        panel=_EFFICIENCY,
    )
    batch_sizes: Counts = _setting(
        [1, 8, 32], "Sequences that are timed together.", panel=_EFFICIENCY
    )
    prompt_tokens: int | None = _setting(
        None,
        "Tokens of each prompt; by default 512, or what the model has positions for if fewer.",
        panel=_EFFICIENCY,
        ge=1,
    )
    new_tokens: int = _setting(64, "Tokens that are made after it.", panel=_EFFICIENCY, ge=1)
    turns: int = _setting(
        5, "Turns that are timed, after one that is not.", panel=_EFFICIENCY, ge=1
    )
    compile: bool = _setting(False, "Time what torch.compile makes.", panel=_EFFICIENCY)


class Settings(Section):
    """The whole profile."""

    model: ModelSettings = ModelSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    plan: PlanSettings = PlanSettings()
    compress: CompressSettings = CompressSettings()
    eval: EvalSettings = EvalSettings()


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSettings,
    "calibration": CalibrationSettings,
    "plan": PlanSettings,
    "compress": CompressSettings,
    "eval": EvalSettings,
}


def flag_of(section: str, key: str) -> str:
    """Return the flag of a setting, such as ``--rank-method``."""
    return str(_extra(section, key)["flag"]) or f"--{key.replace('_', '-')}"


def panel_of(section: str, key: str) -> str:
    """Return the panel of a setting in ``--help``, empty where it is that of its section."""
    return str(_extra(section, key)["panel"])


def choices_of(section: str, key: str) -> list[str]:
    """Return the values that completion offers for a setting, none where they are unknown."""
    kind = item_of(kind_of(section, key))
    listed: list[str] = _extra(section, key)["choices"]
    return list(get_args(kind)) if get_origin(kind) is Literal else listed


def _extra(section: str, key: str) -> dict[str, Any]:
    return cast(dict[str, Any], SECTIONS[section].model_fields[key].json_schema_extra)


def kind_of(section: str, key: str) -> Any:
    """Return a setting's plain type: without bounds, and without the None of an unset one."""
    return _plain(SECTIONS[section].model_fields[key].annotation)


def item_of(kind: Any) -> Any:
    """Return the type of a list's items, and any other type as it is."""
    return get_args(kind)[0] if get_origin(kind) is list else kind


def _plain(annotation: Any) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _plain(arguments[0])
    if origin in (types.UnionType, Union):
        return next(_plain(a) for a in arguments if a is not type(None))
    if origin is list:
        return list[_plain(arguments[0])]  # type: ignore[misc]
    return annotation
