"""Scores of models in lm-eval tasks; reuses stored scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hisvd_cli.evaluation.store import Store, open_store
from hisvd_cli.evaluation.zero_shot import NamedTask, Score, open_tasks, score
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.whole_model import load_source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.samples import stored_dtype, tokenizer_digest
from hisvd_cli.utils.device import pick_device, pick_dtype
from hisvd_cli.utils.files.fingerprints import digest, expanded
from hisvd_cli.utils.progress import Reporter
from hisvd_cli.utils.versions import versions


class TaskRunner:
    """Runs the same lm-eval tasks on several models.

    Args:
        resolved: the settings.
        reporter: receives progress.
        fresh: ignore stored scores.

    Raises:
        UsageError: lm-eval is not installed, or a task is unknown.
        DataError: the data of a task is unavailable.
    """

    def __init__(self, resolved: Resolved, reporter: Reporter, fresh: bool = False) -> None:
        wanted = resolved.settings.eval
        folder = expanded(wanted.task_path) if wanted.task_path else None
        names = list(dict.fromkeys(wanted.tasks))
        self._tasks: Sequence[NamedTask] = (
            open_tasks(names, folder, wanted.num_fewshot, wanted.limit, reporter) if names else []
        )
        self._settings = resolved.settings
        self._reporter = reporter
        self._fresh = fresh
        self._store: Store = open_store()

    def scores(self, source: Source) -> list[Score] | None:
        """Return a model's scores; None if no task is named.

        Raises:
            HisvdError: the model cannot be loaded, or lm-eval cannot run it.
        """
        if not self._tasks:
            return None
        found = [None if self._fresh else self._known(task, source) for task in self._tasks]
        if any(each is None for each in found):
            found = self._run(source, found)
        return [one for each in found for one in each or []]

    def _run(self, source: Source, found: Sequence[list[Score] | None]) -> list[list[Score] | None]:
        """Compute the missing scores and store them."""
        device = pick_device(self._settings.model.device)
        dtype = pick_dtype(self._settings.model.dtype, stored_dtype(source), device)
        model = load_source(source, device, dtype)
        label = f"Running lm-eval on {Path(source.name).name}"
        filled = list(found)
        with self._reporter.stage(label, sum(each is None for each in found)) as step:
            for i, task in enumerate(self._tasks):
                if filled[i] is None:
                    made = score(task, model, source.tokenizer, self._settings.eval.batch)
                    rows = [each.document() for each in made]
                    about = {"model": source.name, "task": task.name, "versions": versions()}
                    self._store.save_document(self._key(task, source), {**about, "scores": rows})
                    filled[i] = made
                    step()
        return filled

    def _known(self, task: NamedTask, source: Source) -> list[Score] | None:
        document = self._store.load_document(self._key(task, source))
        try:
            return None if document is None else [Score(**row) for row in document["scores"]]
        except (KeyError, TypeError):  # a damaged file
            return None

    def _key(self, task: NamedTask, source: Source) -> str:
        made_by = versions()
        device = pick_device(self._settings.model.device)
        dtype = pick_dtype(self._settings.model.dtype, stored_dtype(source), device)
        how = f"{dtype} {device.type} {made_by['torch']} {made_by['transformers']}"
        return digest("tasks", task.key, source.fingerprint, tokenizer_digest(source), how)
