"""What every ``--json`` document holds: the keys of design.md section 6, and no others unsaid."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number", "minimum": 0}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
RATIO: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
FLAG: Schema = {"type": "boolean"}
SHA256: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
SHAPE: Schema = {"type": "array", "items": COUNT, "minItems": 2, "maxItems": 3}


def strict(**properties: Schema) -> Schema:
    """An object with these keys, all of them, and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def sometimes(schema: Schema, **properties: Schema) -> Schema:
    """An object that may have these keys besides its own."""
    return {**schema, "properties": {**schema["properties"], **properties}}


def rows(**properties: Schema) -> Schema:
    """A list of such objects, not empty."""
    return {"type": "array", "items": strict(**properties), "minItems": 1}


def maybe(schema: Schema) -> Schema:
    """Null as well."""
    return {"anyOf": [schema, {"type": "null"}]}


VERSIONS = strict(hisvd=TEXT, torch=TEXT, transformers=TEXT)
MODEL = strict(name=TEXT, revision=maybe(TEXT), fingerprint=SHA256)
PLANNED_MODEL = sometimes(
    strict(name=TEXT, revision=maybe(TEXT), fingerprint=SHA256, parameters=COUNT),
    active_parameters=COUNT,
    experts_per_token=COUNT,
)
DATA = strict(
    dataset=TEXT,
    drop={"type": "string"},
    split=TEXT,
    text_sha256=SHA256,
    tokens_sha256=SHA256,
    samples=COUNT,
    seqlen=COUNT,
    tokens=COUNT,
    seed=COUNT,
)
MODEL_SETTINGS = strict(
    name={"type": "string"},
    revision=maybe(TEXT),
    trust_remote_code=FLAG,
    device=TEXT,
    dtype={"enum": ["auto", "float32", "bfloat16", "float16"]},
)
CALIBRATION_SETTINGS = strict(
    dataset=TEXT, drop={"type": "string"}, samples=maybe(COUNT), seqlen=maybe(COUNT), seed=COUNT
)
STORAGE: Schema = {"enum": ["pair", "pivoted"]}
_KNOBS: dict[str, Schema] = {
    "preset": maybe(TEXT),
    "bytes_ratio": maybe(RATIO),
    "ratio_of": {"enum": ["sublayers", "model"]},
    "storage": STORAGE,
    "metric": {"enum": ["whitened", "fisher", "held-out", "weight"]},
    "input_shrinkage": SHARE,
    "output_shrinkage": SHARE,
    "selection": {"enum": ["zero-sum", "smallest", "negative-sum", "sigma", "loss-order"]},
    "importance_weight": SHARE,
    "sensitivity_ratios": {"type": "array", "items": RATIO},
    "probe_ratio": RATIO,
    "depth_factor": NUMBER,
    "probe_samples": COUNT,
    "learning_start": {"enum": ["uniform", "waterfill"]},
    "learning_steps": COUNT,
    "learning_rate": NUMBER,
    "softness": NUMBER,
    "rank_method": {"enum": ["stable", "effective", "mathematical"]},
    "alpha": NUMBER,
    "spectrum": {"enum": ["whitened", "weight"]},
    "modulation": {"enum": ["logarithmic", "power", "exponential", "linear"]},
    "lwe_strength": NUMBER,
    "tail_redundancy_weight": NUMBER,
    "min_rank_ratio": SHARE,
    "multiple_of": COUNT,
    "include": {"type": "array", "items": TEXT},
    "exclude": {"type": "array", "items": TEXT},
}
PLAN_SETTINGS = strict(ratio=RATIO, allocator=TEXT, **_KNOBS)
_ALLOCATORS = {"type": "array", "items": TEXT, "minItems": 1}
RECORDED = strict(
    model=MODEL_SETTINGS,
    calibration=CALIBRATION_SETTINGS,
    plan=strict(ratio={"type": "array", "items": RATIO}, allocator=_ALLOCATORS, **_KNOBS),
    compress=strict(
        decomposer=TEXT,
        solver=TEXT,
        max_shard_size=NUMBER,
        stages=COUNT,
        correction=TEXT,
        correction_samples=COUNT,
        correction_batches=COUNT,
        correction_alpha=NUMBER,
        correction_step=NUMBER,
        asvd_alpha=NUMBER,
        weighting=TEXT,
        oversamples=COUNT,
        power_iterations=COUNT,
    ),
    quantize=strict(
        bits={"enum": ["none", "int8", "int4"]},
        method={"enum": ["nearest", "gptq"]},
        dense={"enum": ["int8", "same"]},
        group_size=COUNT,
        damping=NUMBER,
    ),
)

BYTES = strict(
    ratio=RATIO,
    budget=COUNT,
    kept=COUNT,
    full=COUNT,
    model=COUNT,
    method={"enum": ["nearest", "gptq"]},
    group_size=COUNT,
    frontier=rows(method=TEXT, budget=maybe(RATIO), bytes_ratio=NUMBER, predicted_loss=NUMBER),
)
PLAN = strict(
    kind={"const": "plan"},
    format_version=COUNT,
    ratio=RATIO,
    model_ratio=RATIO,
    allocator=TEXT,
    settings=PLAN_SETTINGS,
    budget_parameters=COUNT,
    kept_parameters=COUNT,
    predicted_loss=NUMBER,
    clusters=rows(
        cluster=TEXT,
        sublayers=COUNT,
        density=maybe(SHARE),
        tail_share=SHARE,
        factor=maybe(NUMBER),
        kept_ratio=RATIO,
    ),
    sublayers=rows(
        name=TEXT,
        layer=COUNT,
        cluster=TEXT,
        shape=SHAPE,
        density=maybe(SHARE),
        baseline_rank=COUNT,
        rank=COUNT,
        full_rank=COUNT,
        dense=FLAG,
        parameters=COUNT,
        loss=NUMBER,
        bits={"enum": [16, 8, 4]},
        bytes=maybe(COUNT),
    ),
    provenance=strict(model=PLANNED_MODEL, calibration=maybe(SHA256), versions=VERSIONS),
    bytes=maybe(BYTES),
)
PLANS = strict(plans={"type": "array", "items": PLAN, "minItems": 2})

_AUDIT = strict(
    kind={"enum": ["checkpoint", "pt", "plan", "calibration", "model"]},
    ratio=maybe(RATIO),
    model_ratio=maybe(RATIO),
    parameters=maybe(COUNT),
    dense_parameters=maybe(COUNT),
    bytes=COUNT,
    dense_bytes=maybe(COUNT),
    bytes_ratio=maybe(NUMBER),
    sublayers={
        "type": "array",
        "items": strict(
            name=TEXT,
            layer=maybe(COUNT),
            cluster=TEXT,
            shape=SHAPE,
            rank=COUNT,
            dense=FLAG,
            dtype={"type": "string"},
            storage=STORAGE,
            bits=maybe(COUNT),
        ),
    },
    provenance={"type": "object"},
    problems={"type": "array", "items": TEXT},
)
INSPECT = sometimes(_AUDIT, active_parameters=COUNT, dense_active_parameters=COUNT)

SIGNED: Schema = {"type": "number"}
INTERVAL = maybe({"type": "array", "items": SIGNED, "minItems": 2, "maxItems": 2})
RESULTS = rows(
    dataset=TEXT,
    split=TEXT,
    perplexity=maybe(NUMBER),
    bits_per_byte=maybe(NUMBER),
    kl=maybe(SIGNED),
    agreement=maybe(SHARE),
    intervals=strict(perplexity=INTERVAL, bits_per_byte=INTERVAL, kl=INTERVAL, agreement=INTERVAL),
    bootstrap=strict(
        unit={"enum": ["windows", "blocks of tokens"]},
        units=COUNT,
        draws=COUNT,
        seed=COUNT,
        level=SHARE,
    ),
    tokens=COUNT,
    bytes=maybe(COUNT),
    windows=COUNT,
    seqlen=COUNT,
    bos=TEXT,
    dataset_hash=SHA256,
    nonfinite_windows={"type": "array", "items": COUNT},
    dtype=TEXT,
)
COMPARISONS: Schema = {
    "type": "array",
    "items": strict(
        dataset=TEXT,
        figure={"enum": ["nats_per_token", "kl", "agreement"]},
        model=TEXT,
        other=TEXT,
        difference=SIGNED,
        interval=INTERVAL,
        better=maybe(TEXT),
    ),
}
TASKS: Schema = {
    "type": "array",
    "items": strict(
        task=TEXT,
        metric=TEXT,
        filter=TEXT,
        value=maybe(SIGNED),
        stderr=maybe(NUMBER),
        higher_is_better=maybe(FLAG),
        num_fewshot=maybe(COUNT),
        questions=maybe(COUNT),
        version={"type": "string"},
    ),
}
_PHASE = strict(
    tokens=COUNT,
    tokens_per_second=NUMBER,
    latency_seconds=strict(p50=NUMBER, p90=NUMBER, p99=NUMBER),
)
_TIMING = strict(prefill=_PHASE, decode=_PHASE, peak_memory_bytes=COUNT)
_VERSUS = strict(speedup=NUMBER, verdict={"enum": ["faster", "slower", "unclear"]})
EFFICIENCY = strict(
    device=TEXT,
    dtype=TEXT,
    threads=COUNT,
    compiled=FLAG,
    prompt_tokens=COUNT,
    new_tokens=COUNT,
    turns=COUNT,
    weight_bytes=COUNT,
    baseline_weight_bytes=maybe(COUNT),
    batches=rows(
        batch=COUNT,
        model=_TIMING,
        baseline=maybe(_TIMING),
        versus_baseline=maybe(strict(prefill=_VERSUS, decode=_VERSUS)),
    ),
)
BASELINE = maybe(strict(model=TEXT, results=RESULTS, tasks=maybe(TASKS)))
EVAL = strict(
    model=TEXT,
    results=RESULTS,
    baseline=BASELINE,
    comparisons=COMPARISONS,
    efficiency=maybe(EFFICIENCY),
    tasks=maybe(TASKS),
)
EVALS = strict(
    evaluations={"type": "array", "items": EVAL},
    baseline=BASELINE,
    comparisons=COMPARISONS,
    failures={"type": "array", "items": strict(model=TEXT, message=TEXT)},
)

_STAGES = strict(calibrate=NUMBER, plan=NUMBER, decompose=NUMBER, write=NUMBER)
_PERPLEXITY = maybe(strict(before=maybe(NUMBER), after=maybe(NUMBER)))
COMPRESS = strict(
    output=TEXT,
    ratio=RATIO,
    model_ratio=RATIO,
    kept_parameters=COUNT,
    bytes=COUNT,
    seconds=_STAGES,
    peak_memory_bytes=COUNT,
    plan=TEXT,
    perplexity=_PERPLEXITY,
    dtype=TEXT,
    stored_dtype=TEXT,
)
CELLS = strict(
    cells=rows(
        output=TEXT,
        preset=maybe(TEXT),
        ratio=RATIO,
        status={"enum": ["made", "kept", "failed"]},
        model_ratio=maybe(RATIO),
        kept_parameters=maybe(COUNT),
        bytes=maybe(COUNT),
        seconds=maybe(_STAGES),
        peak_memory_bytes=maybe(COUNT),
        plan=maybe(TEXT),
        perplexity=_PERPLEXITY,
        message=maybe(TEXT),
    )
)
PLACE = {"enum": ["device", "host", "file"]}
COMPRESS_FORECAST = strict(
    dry_run={"const": True},
    output=TEXT,
    ratio=RATIO,
    bytes=COUNT,
    dense_bytes=COUNT,
    calibration_bytes=COUNT,
    peak_memory_bytes=COUNT,
    hidden_states=maybe(PLACE),
    batch=maybe(COUNT),
    stages=strict(calibrate=NUMBER, plan=NUMBER, decompose=NUMBER),
    seconds=NUMBER,
)

CALIBRATE = strict(
    output=TEXT,
    seconds=NUMBER,
    kind={"const": "calibration"},
    format_version=COUNT,
    key=SHA256,
    model=MODEL,
    data=DATA,
    dtype=TEXT,
    settings=strict(model=MODEL_SETTINGS, calibration=CALIBRATION_SETTINGS),
    versions=VERSIONS,
    gradients=maybe({"type": "object"}),
)
CALIBRATE_FORECAST = strict(
    dry_run={"const": True},
    tokens=COUNT,
    bytes=COUNT,
    peak_memory_bytes=COUNT,
    hidden_states=PLACE,
    batch=COUNT,
    seconds=NUMBER,
)

CONVERT = strict(output=TEXT, to={"enum": ["hf", "pt", "dense"]}, bytes=COUNT)

PROVENANCE = strict(
    kind={"const": "checkpoint"},
    format_version=COUNT,
    model=PLANNED_MODEL,
    decomposer=TEXT,
    calibration=maybe({"type": "object"}),
    gradients=maybe({"type": "object"}),
    ratio=RATIO,
    model_ratio=RATIO,
    allocator=TEXT,
    budget_parameters=COUNT,
    kept_parameters=COUNT,
    settings=RECORDED,
    versions=VERSIONS,
    files={
        "type": "object",
        "additionalProperties": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    },
)
