"""Finds tensors of a ``.pt`` file that the model of its config does not have."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.structure.naming import names_in_model
from hisvd_cli.modeling.structure.skeleton import build_meta_model
from hisvd_cli.utils.errors import HisvdError
from hisvd_cli.utils.files.json_files import write_json


def surplus_problems(
    config: Mapping[str, Any], factors: Collection[str], found: Collection[str]
) -> list[str]:
    """Return a line per tensor that is not part of the model, as for a folder.

    The model is built without weights, and without code that a config names.

    Args:
        config: the content of config.json.
        factors: names of the tensors of the sublayers, low-rank or dense.
        found: names of the tensors in the file.
    """
    with tempfile.TemporaryDirectory(prefix="hisvd-") as folder:
        write_json(Path(folder) / "config.json", config)
        try:
            source = Source("the file", Path(folder))
            model = build_meta_model(source, compressed=True, working=False)
        except HisvdError as error:
            return [error.message]
    known = {*factors, *model.state_dict()}
    names, _ = names_in_model(model, known, found)
    return [f"{name}: not part of the model." for name in found if names[name] not in known]
