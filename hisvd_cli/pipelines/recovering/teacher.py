"""Opens the dense model that a recovery learns from."""

from __future__ import annotations

from hisvd_cli.inspection.audit import part
from hisvd_cli.modeling.checkpoints.checkpoint import Checkpoint
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.recovering.recovery_texts import text_of
from hisvd_cli.pipelines.samples import SELF
from hisvd_cli.utils.errors import SourceError


def open_teacher(resolved: Resolved, checkpoint: Checkpoint) -> Source | None:
    """Open the dense model that the settings or else the provenance name; None if the method needs
    none.

    Raises:
        SourceError: neither names a model, or the model is missing.
    """
    knobs, model = resolved.settings.recover, resolved.settings.model
    if knobs.method == "lora" and text_of(resolved, checkpoint) != SELF:
        return None
    made = part(checkpoint.provenance, "model")
    name, revision = model.name or made.get("name"), model.revision or made.get("revision")
    if not name:
        raise SourceError(
            f"{checkpoint.folder} does not record which model it was made from.",
            "Name the dense model with `model.name`.",
        )
    if model.name and not model.revision and model.name != made.get("name"):
        revision = None
    return open_source(str(name), revision, model.trust_remote_code)
