"""Sequential LoRA of low-rank factors (SVD-LLM, Wang et al. 2025, arXiv 2403.07378, section 3.3).

Adapters on all factors U are trained and merged first, then adapters on all factors V, so that the
gradients of one factor do not depend on changes of the other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hisvd_cli.finetuning.distillation import likelihood_of, summed_loss
from hisvd_cli.finetuning.factor_training import (
    Factors,
    RunOptions,
    held_out_measures,
    set_checkpointing,
)
from hisvd_cli.finetuning.trained_pairs import TrainedPair, open_pairs
from hisvd_cli.finetuning.trainer import BEST, Progress, Schedule, Trainee, Training
from hisvd_cli.finetuning.training_data import TrainingData
from hisvd_cli.modeling.decoding import TwoParts
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.whole_model import load_model
from hisvd_cli.utils.device import seeded
from hisvd_cli.utils.errors import SourceError, UsageError
from hisvd_cli.utils.files.checksums import intact, seal, sealed
from hisvd_cli.utils.files.json_files import read_json, write_json
from hisvd_cli.utils.files.tensorfile import AGAIN, read_tensors
from hisvd_cli.utils.progress import Reporter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_DONE = "done.json"


@dataclass(frozen=True)
class Adapter:
    """Options of LoRA adapters: rank, alpha (the scale is alpha over rank) and dropout."""

    rank: int
    alpha: int
    dropout: float


def check_peft() -> None:
    """Raise UsageError if ``peft`` is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "`recover.method` lora requires peft, which is not installed.",
            "Run: pip install 'hisvd[recover]'",
        ) from error


def adapt(
    student: Source,
    data: TrainingData,
    schedule: Schedule,
    run: RunOptions,
    adapter: Adapter,
    home: Path,
    reporter: Reporter,
) -> tuple[Factors, Progress]:
    """Train adapters on all factors U for next-token prediction, merge them, and repeat for V.

    Args:
        student: the checkpoint.
        data: training windows; the last ones are held out.
        schedule: schedule of each of the two trainings.
        run: how the model runs.
        adapter: options of the adapters.
        home: work folder, from which an interrupted training resumes.
        reporter: receives progress.

    Returns:
        The factors with the adapters of the best held-out states merged, and the combined progress.

    Raises:
        NumericalError: the held-out loss of the untrained checkpoint is not finite.
    """
    model = load_model(student.folder, run.device, run.dtype)
    pairs = as_linears(model)
    set_checkpointing(model, run.checkpointing)
    first, second = (
        _train_one(model, list(pairs), factor, data, schedule, run, adapter, home, reporter)
        for factor in ("u", "v")
    )
    factors = {}
    for name in pairs:
        weights = model.get_submodule(name).state_dict()
        factors[name] = (weights["u.weight"], weights["v.weight"])
    return factors, _both(first, second)


def as_linears(model: nn.Module) -> dict[str, nn.Sequential]:
    """Replace every low-rank layer by two linear layers ``v`` and ``u`` in float32, in place."""
    layers = {name: _linears(pair) for name, pair in open_pairs(model).items()}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return layers


def _linears(pair: TrainedPair) -> nn.Sequential:
    (m, r), n = pair.u.shape, pair.v.shape[1]
    u = nn.Linear(r, m, bias=pair.bias is not None, device="meta")
    v = nn.Linear(n, r, bias=False, device="meta")
    made = nn.Sequential(OrderedDict(v=v, u=u))
    tensors = {"v.weight": pair.v.detach(), "u.weight": pair.u.detach()}
    if pair.bias is not None:
        tensors["u.bias"] = pair.bias.detach()
    made.load_state_dict(tensors, assign=True)
    return made.requires_grad_(False)


def _train_one(
    model: PreTrainedModel,
    names: list[str],
    factor: str,
    data: TrainingData,
    schedule: Schedule,
    run: RunOptions,
    adapter: Adapter,
    home: Path,
    reporter: Reporter,
) -> Progress:
    """Train and merge adapters on one factor of all pairs, in place."""
    home = home / factor
    home.mkdir(exist_ok=True)
    with seeded(schedule.seed, run.device):
        adapted = adapted_model(model, [f"{name}.{factor}" for name in names], adapter)
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if sealed(home / _DONE) and intact(home / BEST):
            best, _ = read_tensors(home / BEST, AGAIN)
            progress = _read_progress(home / _DONE)
        else:
            trainee = _trainee(model, parameters, data, schedule, run)
            best, progress = Training(trainee, schedule, home, run.device, reporter).run()
            write_json(home / _DONE, asdict(progress))
            seal(home / _DONE)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(best[name])
    adapted.merge_and_unload()
    return progress


def adapted_model(model: PreTrainedModel, targets: list[str], adapter: Adapter) -> PeftModel:
    """Add LoRA adapters to linear layers of a model, in place; only adapters are trainable."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
    )
    made: PeftModel = get_peft_model(model, config)
    made.eval()
    return made


def _trainee(
    model: PreTrainedModel,
    parameters: dict[str, nn.Parameter],
    data: TrainingData,
    schedule: Schedule,
    run: RunOptions,
) -> Trainee:
    student = TwoParts(model, run.dtype)
    count, held_out = data.split()

    def loss(rows: Tensor) -> tuple[Tensor, int]:
        counted = data.counted[rows].to(run.device)
        ids = data.ids[rows].to(run.device)
        with _dropout(model):
            states = student.states(ids)[counted]
        targets = ids.roll(-1, 1)[counted]
        return summed_loss(states, student.head, likelihood_of(targets)), len(states)

    return Trainee(
        parameters,
        count,
        loss,
        lambda: held_out_measures(student, data, held_out, schedule.together, None),
    )


@contextmanager
def _dropout(model: nn.Module) -> Iterator[None]:
    """Enable the dropout of adapters, but no other dropout, in the body."""
    layers = [m for n, m in model.named_modules() if n.endswith("lora_dropout.default")]
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer in layers:
            layer.eval()


def _both(first: Progress, second: Progress) -> Progress:
    """Return the combined progress of two consecutive trainings."""
    return Progress(
        steps=first.steps + second.steps,
        tokens=first.tokens + second.tokens,
        seconds=first.seconds + second.seconds,
        measured=first.measured + second.measured,
        before=first.before,
        best=second.best,
        best_step=first.steps + second.best_step,
        stopped=second.stopped or first.stopped,
    )


def _read_progress(path: Path) -> Progress:
    try:
        return Progress(**read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise SourceError(
            f"{path} is damaged.", f"Remove {path.parent.parent.parent} and run again."
        ) from error
