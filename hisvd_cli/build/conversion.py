"""Arguments of ``hisvd convert`` ─► the right conversion."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

from hisvd_cli.build.compression import check_output
from hisvd_cli.checkpoint import open_checkpoint
from hisvd_cli.convert import from_pt, repack, to_dense, to_pt, unpacked
from hisvd_cli.errors import OutputError, SourceError

Target = Literal["hf", "pt", "dense"]


def convert_checkpoint(
    checkpoint: Path, to: Target, output: Path, overwrite: bool, shard_bytes: int
) -> int:
    """Convert a checkpoint folder or ``.pt`` file; return the bytes written.

    Raises:
        SourceError: ``checkpoint`` is none.
        OutputError: something stands at ``output``, or its name does not fit ``to``.
    """
    if not checkpoint.exists():
        raise SourceError(f"There is no checkpoint '{checkpoint}'.", "Check the path.")
    if (output.suffix == ".pt") != (to == "pt"):
        raise OutputError(
            f"--to {to} cannot write '{output}'.",
            "A single file ends in .pt; every other form is a folder.",
        )
    if output.resolve() == checkpoint.resolve():
        raise OutputError(f"{output} is the input itself.", "Name another --output.")
    check_output(output, overwrite)
    with tempfile.TemporaryDirectory(prefix=".hisvd-", dir=_scratch_home(output)) as scratch:
        if checkpoint.is_file() and to == "hf":
            from_pt(checkpoint, output, shard_bytes)
        else:
            opened = open_checkpoint(unpacked(checkpoint, Path(scratch) / "unpacked"))
            if to == "pt":
                to_pt(opened, output)
            elif to == "dense":
                to_dense(opened, output, shard_bytes)
            else:
                repack(opened, output, shard_bytes)
    if output.is_file():
        return output.stat().st_size
    return sum(path.stat().st_size for path in output.glob("*.safetensors"))


def _scratch_home(output: Path) -> Path:
    """A ``.pt`` is unpacked beside the output: there is room, where /tmp may be small."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"Cannot write {output}: {error.strerror}.", "Name another --output."
        ) from error
    return output.parent
