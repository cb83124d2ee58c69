"""``load``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import Unpack

from hisvd_cli.modeling.whole_model import load_source
from hisvd_cli.pipelines.api.arguments import function, run_of, text_of
from hisvd_cli.pipelines.api.keywords import LoadKeywords, PathText
from hisvd_cli.pipelines.evaluating.targets import open_target
from hisvd_cli.utils.device import pick_device, pick_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@function(LoadKeywords)
def load(
    checkpoint: PathText,
    *,
    profile: PathText | None = None,
    progress: bool = True,
    **settings: Unpack[LoadKeywords],
) -> PreTrainedModel:
    """Load a checkpoint, or any model, with transformers for inference.

    Args:
        checkpoint: checkpoint folder, ``.pt`` file of hisvd, or any model.
        profile: profile to read, a file or the name of a built-in profile.
        progress: report progress and warnings on stderr.
        settings: see below.

    Raises:
        SourceError: the checkpoint is missing or damaged.
        UsageError: a value is invalid, or there is no such device.
    """
    name = text_of(checkpoint, "checkpoint", "a checkpoint or the name of a model")
    run = run_of("load", settings, profile, progress)
    model = run.resolved.settings.model
    device = pick_device(model.device)
    with open_target(run.resolved, name) as source:
        return load_source(source, device, pick_dtype(model.dtype, source.weights.dtype, device))
