"""Opens the model that the settings name."""

from __future__ import annotations

from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.errors import UsageError


def named_source(resolved: Resolved) -> Source:
    """Open the model of the settings. Raises UsageError if none is named."""
    model = resolved.settings.model
    if not model.name:
        raise UsageError(
            "No model is named.",
            "Give `model.name` with a Hub id, a folder, a .gguf file, or 'demo'.",
        )

    def fetch() -> Source:
        found = open_source(model.name, model.revision, model.trust_remote_code)
        if world().size > 1:
            _ = found.fingerprint  # reads all weights of a local model; other processes use a cache
        return found

    return world().after_first(fetch)
