"""Zero-shot and few-shot tasks: lm-eval finds, asks and scores them; here is what it is given and
what it found. lm-eval is imported only where tasks are asked for."""

from __future__ import annotations

import difflib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hisvd_cli.utils.errors import DataError, HisvdError, UsageError, reason
from hisvd_cli.utils.files.fingerprints import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""lm-eval's own, so that its command line finds the same numbers."""
_REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


@dataclass(frozen=True)
class Score:
    """What a model reached in a task.

    Attributes:
        task: lm-eval's name.
        metric: such as ``acc`` or ``acc_norm``.
        filter: how answers are read, mostly ``none``.
        value: None for one that is not finite.
        stderr: its standard error, where lm-eval knows one.
        higher_is_better: None where the task does not say.
        num_fewshot: examples in front of each question.
        questions: how many were asked.
        version: the task's.
    """

    task: str
    metric: str
    filter: str
    value: float | None
    stderr: float | None
    higher_is_better: bool | None
    num_fewshot: int | None
    questions: int | None
    version: str

    @property
    def measure(self) -> str:
        """The metric, and how answers are read where that is not the usual way."""
        return self.metric if self.filter == "none" else f"{self.metric} ({self.filter})"

    def document(self) -> dict[str, Any]:
        """Return the score as JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class NamedTask:
    """A task, a group or a tag as the user named it, loaded.

    Attributes:
        name: lm-eval's name.
        loaded: what lm-eval's ``TaskManager.load`` made of it.
        limit: only so many questions of each task.
        key: sha256 of questions, settings and lm-eval's version.
    """

    name: str
    loaded: Any
    limit: int | None
    key: str


def open_tasks(
    names: Sequence[str], folder: Path | None, num_fewshot: int | None, limit: int | None
) -> list[NamedTask]:
    """Find tasks and read their data, before any model is loaded.

    Args:
        names: tasks, groups or tags.
        folder: tasks beside those of lm-eval; they win.
        num_fewshot: examples in front of each question; None for what the task says.
        limit: only so many questions of each task.

    Raises:
        UsageError: lm-eval is not installed, a name is unknown, or there is no such folder.
        DataError: a task's data cannot be had.
    """
    if folder is not None and not folder.is_dir():
        raise UsageError(
            f"--task-path {folder} is not a folder.", "Name one that holds YAML files."
        )
    manager = _manager(folder, names)
    for name in names:
        if name not in manager.all_tasks:
            raise UsageError(f"lm-eval knows no task '{name}'.", _nearest(name, manager.all_tasks))
    return [_load(manager, name, num_fewshot, limit) for name in names]


def _manager(folder: Path | None, names: Sequence[str]) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(
            "--tasks needs lm-eval, which is not installed.", "Run: pip install 'hisvd[eval]'"
        ) from error
    if folder is not None:
        # lm-eval's own fourteen thousand names take seconds to read.
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=None if folder is None else str(folder))


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(repr(each) for each in near)}?"
    return "See all of them with: lm_eval ls tasks. For tasks of your own, pass --task-path FOLDER."


def _load(manager: Any, name: str, num_fewshot: int | None, limit: int | None) -> NamedTask:
    try:
        loaded = manager.load([name])
        for task in loaded["tasks"].values():
            _set_fewshot(task, num_fewshot)
        key = _key(name, loaded["tasks"], limit)
    # A task is code and data of someone else: whatever it raises, this task cannot be asked.
    except Exception as error:
        raise DataError(
            f"The data of task '{name}' cannot be read: {reason(error)}",
            "Fetch it once where there is a network (HF_HUB_OFFLINE=0), or name a task of your own "
            "with --task-path FOLDER.",
        ) from error
    return NamedTask(name, loaded, limit, key)


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """Set the examples of a task as ``lm_eval.simple_evaluate`` does: one that says 0 keeps it."""
    said = task.get_config("num_fewshot")
    if said is None or (num_fewshot is not None and said != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=_SEEDS["fewshot"])


def _key(name: str, tasks: dict[str, Any], limit: int | None) -> str:
    parts = [version("lm_eval"), version("datasets"), name, str(limit), json.dumps(_SEEDS)]
    for task in tasks.values():
        examples = task.fewshot_docs() if task.get_config("num_fewshot") else []
        parts.append(json.dumps(task.dump_config(), sort_keys=True, default=str))
        for docs in (task.eval_docs, examples):
            parts += [json.dumps(doc, sort_keys=True, default=str) for doc in docs or []]
    return digest(*parts)


def score(
    task: NamedTask, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int
) -> list[Score]:
    """Let lm-eval ask a model the questions of a task, and of those below it.

    Args:
        task: what to ask.
        model: in memory, on the device where it is to run.
        tokenizer: its tokenizer.
        batch: requests per forward pass.

    Raises:
        HisvdError: lm-eval cannot ask them of this model.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    random.seed(_SEEDS["python"])
    np.random.seed(_SEEDS["numpy"])
    torch.manual_seed(_SEEDS["torch"])
    asked = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)
    for request in _REQUESTS:  # bars that would be drawn over those of the command line
        setattr(asked, request, partial(getattr(asked, request), disable_tqdm=True))
    try:
        found = lm_eval.evaluate(
            lm=asked, task_dict=task.loaded, limit=task.limit, log_samples=False
        )
    except IndexError as error:  # torch: an id without an embedding
        rows = int(model.config.get_text_config().vocab_size)
        raise HisvdError(
            f"lm-eval cannot run the task '{task.name}': {reason(error)} The tokenizer has "
            f"{len(tokenizer)} tokens, the model {rows} embeddings.",
            "Put the tokenizer beside the weights that the model was trained with.",
        ) from error
    except (ValueError, AssertionError, KeyError, TypeError, NotImplementedError) as error:
        raise HisvdError(
            f"lm-eval cannot run the task '{task.name}': {reason(error)}",
            "See the cause with HISVD_DEBUG=1.",
        ) from error
    return _scores(found)


def _scores(found: Any) -> list[Score]:
    """Return the scores of ``lm_eval.evaluate``'s document: of each task ``metric,filter`` and
    ``metric_stderr,filter``."""
    rows = []
    for task, figures in found["results"].items():
        for label, value in figures.items():
            metric, comma, filtered = label.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            rows.append(
                Score(
                    task=task,
                    metric=metric,
                    filter=filtered,
                    value=_number(value),
                    stderr=_number(figures.get(f"{metric}_stderr,{filtered}")),
                    higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
                    num_fewshot=found["n-shot"].get(task),
                    questions=found["n-samples"].get(task, {}).get("effective"),
                    version=str(found["versions"].get(task, "")),
                )
            )
    return rows


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else None
