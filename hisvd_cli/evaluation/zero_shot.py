"""Zero-shot and few-shot tasks, run by lm-eval, which is imported only when tasks are requested."""

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
from hisvd_cli.utils.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""The defaults of lm-eval, so that its command line gives the same scores."""
_REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


@dataclass(frozen=True)
class Score:
    """The score of a model in one metric of a task.

    Attributes:
        task: name of the task in lm-eval.
        metric: such as ``acc`` or ``acc_norm``.
        filter: lm-eval's filter for answers, mostly ``none``.
        value: the score; None if not finite.
        stderr: its standard error; None if lm-eval gives none.
        higher_is_better: None if the task does not define it.
        num_fewshot: number of few-shot examples.
        questions: number of questions.
        version: version of the task.
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
        """The metric, with its filter if there is one."""
        return self.metric if self.filter == "none" else f"{self.metric} ({self.filter})"

    def document(self) -> dict[str, Any]:
        """Return the score as JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class NamedTask:
    """A loaded task, group or tag.

    Attributes:
        name: its name in lm-eval.
        loaded: the result of lm-eval's ``TaskManager.load``.
        limit: maximum number of questions per task.
        key: sha256 of the questions, the settings and the version of lm-eval.
    """

    name: str
    loaded: Any
    limit: int | None
    key: str


def open_tasks(
    names: Sequence[str],
    folder: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    reporter: Reporter,
) -> list[NamedTask]:
    """Load tasks and their data, before any model is loaded.

    Args:
        names: tasks, groups or tags.
        folder: folder with additional tasks, which take precedence over those of lm-eval.
        num_fewshot: number of few-shot examples; None for the default of the task.
        limit: maximum number of questions per task.
        reporter: receives progress.

    Raises:
        UsageError: lm-eval is not installed, a name is unknown, or the folder does not exist.
        DataError: the data of a task cannot be loaded.
    """
    if folder is not None and not folder.is_dir():
        raise UsageError(
            f"`eval.task_path={folder}` is not a folder.", "Give a folder with YAML files."
        )
    manager = _manager(folder, names, reporter)
    for name in names:
        if name not in manager.all_tasks:
            raise UsageError(f"lm-eval has no task '{name}'.", _nearest(name, manager.all_tasks))
    return [_load(manager, name, num_fewshot, limit) for name in names]


def _manager(folder: Path | None, names: Sequence[str], reporter: Reporter) -> Any:
    reporter.begin("Reading the list of tasks")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(
            "`eval.tasks` requires lm-eval, which is not installed.",
            "Run: pip install 'hisvd[eval]'",
        ) from error
    if folder is not None:
        # Indexing the fourteen thousand tasks of lm-eval takes up to a minute.
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=None if folder is None else str(folder))


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(repr(each) for each in near)}?"
    return "List all tasks with: lm_eval ls tasks. Your own tasks need `eval.task_path`."


def _load(manager: Any, name: str, num_fewshot: int | None, limit: int | None) -> NamedTask:
    try:
        loaded = manager.load([name])
        for task in loaded["tasks"].values():
            _set_fewshot(task, num_fewshot)
        key = _key(name, loaded["tasks"], limit)
    # Tasks run third-party code, which may raise anything.
    except Exception as error:
        raise DataError(
            f"The data of task '{name}' cannot be loaded: {reason(error)}",
            "Download it once online (HF_HUB_OFFLINE=0), or use your own task in `eval.task_path`.",
        ) from error
    return NamedTask(name, loaded, limit, key)


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """Set the number of few-shot examples as ``lm_eval.simple_evaluate`` does: a task whose
    configuration says 0 keeps it."""
    configured = task.get_config("num_fewshot")
    if configured is None or (num_fewshot is not None and configured != 0):
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
    """Run a task and its subtasks on a model with lm-eval.

    Args:
        task: the task.
        model: the model, in memory on its device.
        tokenizer: its tokenizer.
        batch: requests per forward pass.

    Returns:
        One score for each task and metric.

    Raises:
        HisvdError: lm-eval cannot run the task with this model.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    random.seed(_SEEDS["python"])
    np.random.seed(_SEEDS["numpy"])
    torch.manual_seed(_SEEDS["torch"])
    adapter = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)
    for request in _REQUESTS:  # their progress bars would overlap those of the command line
        setattr(adapter, request, partial(getattr(adapter, request), disable_tqdm=True))
    try:
        found = lm_eval.evaluate(
            lm=adapter, task_dict=task.loaded, limit=task.limit, log_samples=False
        )
    except IndexError as error:  # from torch, for a token id without an embedding
        rows = int(model.config.get_text_config().vocab_size)
        raise HisvdError(
            f"lm-eval cannot run the task '{task.name}': {reason(error)} The tokenizer has "
            f"{len(tokenizer)} tokens, the model {rows} embeddings.",
            "Use the tokenizer that the model was trained with.",
        ) from error
    except (ValueError, AssertionError, KeyError, TypeError, NotImplementedError) as error:
        raise HisvdError(
            f"lm-eval cannot run the task '{task.name}': {reason(error)}",
            "Set HISVD_DEBUG=1 to see the cause.",
        ) from error
    return _scores(found)


def _scores(found: Any) -> list[Score]:
    """Return the scores in the result of ``lm_eval.evaluate``, which has keys ``metric,filter`` and
    ``metric_stderr,filter`` for each task."""
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
