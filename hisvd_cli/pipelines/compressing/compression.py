"""Settings ─► a compressed checkpoint, and everything that it needs on the way."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hisvd_cli.allocation.plan import Plan, load_plan
from hisvd_cli.calibration.text.datasets import Text
from hisvd_cli.compression.factorize import Compressed
from hisvd_cli.compression.stage_times import keep_times
from hisvd_cli.compression.updating import Update
from hisvd_cli.evaluation.perplexity import PerplexityResult, evaluation_windows
from hisvd_cli.export.card_results import update_card
from hisvd_cli.export.convert import to_pt
from hisvd_cli.inspection.audit import part
from hisvd_cli.modeling.checkpoints.checkpoint import PLAN_FILE, open_checkpoint
from hisvd_cli.modeling.skeleton import tell_notes
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.calibration import ensure_calibration, named_source
from hisvd_cli.pipelines.compressing.quantization import (
    check_quantization,
    quantize_compressed,
    quantizes,
)
from hisvd_cli.pipelines.compressing.stages import (
    RECORDED,
    Stage,
    check_stages,
    factored,
    last_stage,
)
from hisvd_cli.pipelines.compressing.updates import prepare_update
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.evaluating.cards import perplexity_results
from hisvd_cli.pipelines.evaluating.evaluation import check_texts, measure, open_target, pick_texts
from hisvd_cli.pipelines.memory.bounds import check_factoring, check_rounding, check_update
from hisvd_cli.pipelines.memory.whole_models import check_evaluation
from hisvd_cli.pipelines.outputs import (
    check_place_of,
    output_path,
    peak_memory,
    plan_beside,
    refuse_flags,
)
from hisvd_cli.pipelines.planning.byte_budgets import bytes_ratio, rounded_by
from hisvd_cli.pipelines.planning.methods import decomposer_needs, plan_needs
from hisvd_cli.pipelines.planning.plans import (
    check_knobs,
    check_planning_memory,
    make_plans,
    open_plan,
)
from hisvd_cli.pipelines.recovering.recovery import check_recovery, check_trains, wants_recovery
from hisvd_cli.pipelines.recovering.texts import reads_the_same
from hisvd_cli.pipelines.recovering.unrecovered import Unmended, mend, unmended
from hisvd_cli.pipelines.samples import default_dataset, window_length
from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.errors import UsageError
from hisvd_cli.utils.files.scratch import clear_beside
from hisvd_cli.utils.progress import Reporter


@dataclass(frozen=True)
class Outcome:
    """A finished compression.

    ``perplexity`` is (before, after) where it was measured; ``plan_path`` a file that holds the
    plan; ``dtype`` that of the forward passes, ``stored_dtype`` that of the weights.
    """

    output: Path
    plan: Plan
    plan_path: Path
    bytes: int
    dense_bytes: int
    seconds: dict[str, float]
    peak_memory_bytes: int
    perplexity: tuple[PerplexityResult, PerplexityResult] | None
    dtype: str
    stored_dtype: str

    @property
    def dense_parameters(self) -> int | None:
        """Parameters of the whole model before; None where an old plan does not say."""
        return self.plan.model_parameters

    @property
    def parameters(self) -> int | None:
        """Parameters of the whole model now."""
        total = self.plan.model_parameters
        return total and total - self.plan.full_parameters + self.plan.kept_parameters

    def document(self) -> dict[str, Any]:
        """Return the outcome as JSON data."""
        perplexity = None
        if self.perplexity is not None:
            before, after = self.perplexity
            perplexity = {"before": before.perplexity, "after": after.perplexity}
        return {
            "output": str(self.output),
            "ratio": self.plan.ratio,
            "model_ratio": self.plan.model_ratio,
            "kept_parameters": self.plan.kept_parameters,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "plan": str(self.plan_path),
            "perplexity": perplexity,
            "dtype": self.dtype,
            "stored_dtype": self.stored_dtype,
        }


def check_request(
    resolved: Resolved,
    source: Source,
    output: Path | None,
    plan_file: Path | None,
    overwrite: bool,
) -> None:
    """Find out before any work whether a compression can succeed.

    Raises:
        UsageError: several allocators, an unknown method, flags that a given plan has decided, or
            a correction without a second stage.
        BudgetError: a ratio that cannot be met.
        MemoryLimitError: a bound on memory that cannot.
        OutputError: something stands at the output.
    """
    decomposer_needs(resolved.settings.compress)
    check_stages(resolved, source)
    if plan_file is None:
        check_quantization(resolved, planned=bytes_ratio(resolved) is not None)
        if len(resolved.settings.plan.allocator) > 1:
            raise UsageError("compress takes one --allocator.", "Run it once per allocator.")
        check_knobs(resolved, source)
        check_planning_memory(resolved, source)
    else:
        given = ("the plan that --plan names", "make the plan anew without --plan")
        refuse_flags(resolved, "plan", *given)
        if resolved.variants:
            raise UsageError(
                "Several presets are set, but --plan names one plan.",
                "Leave out --plan, or set one preset.",
            )
        by_bytes = open_plan(plan_file, source).bytes is not None
        if by_bytes:
            refuse_flags(resolved, "quantize", *given, but=("bits", "damping"))
        check_quantization(resolved, planned=by_bytes)
        check_factoring(resolved, source)
    check_update(resolved, source)
    if resolved.settings.quantize.method == "gptq" and quantizes(resolved):
        check_rounding(resolved, source)
    if _evaluates(resolved, source):
        check_evaluation(resolved, source)
    if wants_recovery(resolved):
        if plan_file is not None:
            check_trains(open_plan(plan_file, source).ranks, resolved)
        elif bytes_ratio(resolved) is None and max(resolved.settings.plan.ratio) == 1:
            check_trains({}, resolved)
        check_recovery(resolved, source)
    path = output_path(resolved, output, plan_file)
    check_place_of(resolved, source, path, plan_file, overwrite)


def compress_model(
    resolved: Resolved,
    output: Path | None,
    plan_file: Path | None,
    overwrite: bool,
    reporter: Reporter,
) -> Outcome:
    """Calibrate, plan and compress, reusing what is there.

    Raises:
        HisvdError: see :func:`check_request`; nothing is written then.
    """
    source = named_source(resolved)
    tell_notes(source, reporter)
    check_request(resolved, source, output, plan_file, overwrite)
    plan = open_plan(plan_file, source) if plan_file else None
    path = output_path(resolved, output, plan_file)
    text = _evaluation_text(resolved, source) if world().first else None
    needs = decomposer_needs(resolved.settings.compress)
    if plan is None:
        needs |= plan_needs(resolved.settings)
    calibration, calibrating = ensure_calibration(resolved, source, reporter, needs=needs)
    if text is not None:
        check_texts([text], calibration.manifest, source.name)
    update = prepare_update(resolved, source, calibration, reporter)
    started = time.monotonic()
    fixed = plan is not None
    plan = plan or make_plans(resolved, source, calibration, reporter)[0]
    planning = time.monotonic() - started
    if wants_recovery(resolved):
        check_trains(plan.ranks, resolved)
    # Again: all that may have come to stand there while the model was calibrated and planned.
    world().agreed(lambda: check_place_of(resolved, source, path, plan_file, overwrite))
    first = Stage(source, calibration, plan)
    with last_stage(resolved, first, fixed, path, reporter) as (last, before):
        made, plan_path, recovering = _write(resolved, last, path, update, reporter)
    seconds = {
        "calibrate": calibrating + before["calibrate"],
        "plan": planning + before["plan"],
        "decompose": made.decompose_seconds + before["decompose"],
        "write": made.write_seconds + before["write"],
        **({"recover": recovering} if wants_recovery(resolved) else {}),
    }
    if world().first:
        keep_times(made.record, seconds)
        clear_beside(path)
    return Outcome(
        output=path,
        plan=last.plan,
        plan_path=plan_path,
        bytes=made.bytes,
        dense_bytes=source.weights.total_bytes,
        seconds=seconds,
        peak_memory_bytes=peak_memory(),
        perplexity=_before_and_after(resolved, source, path, text, reporter),
        dtype=calibration.manifest["dtype"],
        stored_dtype=source.weights.dtype,
    )


def _write(
    resolved: Resolved, last: Stage, path: Path, update: Update | None, reporter: Reporter
) -> tuple[Compressed, Path, float]:
    """Write the checkpoint; return what it took, a file that holds its plan, and the seconds of
    its recovery."""
    single = path.suffix == ".pt"
    folder = path.with_name(f".{path.name}.folder") if single else path
    resolved = rounded_by(resolved, last.plan)
    rounds = quantizes(resolved) or bool(last.plan.bits)
    whole = folder.with_name(f".{path.name}.whole") if rounds else folder
    left = world().agreed(lambda: _unrounded(resolved, last, whole)) if rounds else None
    made, recovering = left or _mended(resolved, last, whole, update, reporter)
    if rounds and not left:
        Unmended(whole).keep()
    if rounds and world().first:
        bits = last.plan.bits or None
        made = quantize_compressed(
            resolved, last.source, last.calibration, made, folder, reporter, bits
        )
    if not single or not world().first:
        return made, path / PLAN_FILE, recovering
    started = time.monotonic()
    to_pt(open_checkpoint(folder), path)
    sidecar = plan_beside(path)
    if not sidecar.exists() or load_plan(sidecar) != last.plan:  # it may be the one that was given
        last.plan.save(sidecar)
    shutil.rmtree(folder)
    writing = made.write_seconds + time.monotonic() - started
    size = path.stat().st_size
    single_file = replace(made, output=path, bytes=size, write_seconds=writing)
    return single_file, plan_beside(path), recovering


def _unrounded(resolved: Resolved, last: Stage, folder: Path) -> tuple[Compressed, float] | None:
    """Return what a run left that was interrupted while it rounded, and no seconds of training;
    None where there is nothing, or it was made by another plan or settings."""
    made = Unmended(folder).kept(last.plan, resolved.recorded(*RECORDED), last.original_key)
    wanted = resolved.recorded("model", "recover") if wants_recovery(resolved) else None
    if made is None or part(made.record, "recovery").get("settings") != wanted:
        return None
    if wanted and not reads_the_same(resolved, last.source.original, made.record):
        return None
    return made, 0.0


def _mended(
    resolved: Resolved, last: Stage, folder: Path, update: Update | None, reporter: Reporter
) -> tuple[Compressed, float]:
    """Factor the model, and train the factors where that is asked for; return what that made, and
    the seconds of the training."""
    if not wants_recovery(resolved):
        return factored(resolved, last, folder, reporter, update), 0.0
    raw, recorded = unmended(folder), resolved.recorded(*RECORDED)
    made = raw.kept(last.plan, recorded, last.original_key)
    if made is None:
        made = factored(resolved, last, raw.folder, reporter, update)
        raw.keep()
    started = time.monotonic()
    size = mend(resolved, raw, folder, last.source.original, reporter)
    record = open_checkpoint(folder).provenance
    return replace(made, output=folder, bytes=size, record=record), time.monotonic() - started


def _evaluation_text(resolved: Resolved, source: Source) -> Text | None:
    """Return the text to measure before and after, read before the work; None for no measuring."""
    if not _evaluates(resolved, source):
        return None
    text = pick_texts(resolved, [source])[0]
    settings = resolved.settings.eval
    # For the error that too short a text raises: now, not after the compression.
    evaluation_windows(text, source, window_length(settings.seqlen, source), settings.windows)
    return text


def _evaluates(resolved: Resolved, source: Source) -> bool:
    wanted = resolved.settings.compress.evaluate
    return default_dataset(source) == source.name if wanted is None else wanted


def _before_and_after(
    resolved: Resolved, source: Source, path: Path, text: Text | None, reporter: Reporter
) -> tuple[PerplexityResult, PerplexityResult] | None:
    if text is None:
        return None
    before = measure(resolved, source, [text], reporter)[0]
    with open_target(resolved, str(path)) as made:
        after = measure(resolved, made, [text], reporter)[0]
    if path.is_dir():  # the card inside a single file was written with it
        update_card(path, perplexity_results([after], [before]))
    return before, after
