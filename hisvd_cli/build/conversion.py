"""Arguments of ``hisvd convert`` ─► the right conversion."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from hisvd_cli.build.outputs import check_output
from hisvd_cli.checkpoint import Checkpoint, open_checkpoint
from hisvd_cli.convert import from_pt, repack, to_dense, to_pt, unpacked
from hisvd_cli.errors import OutputError, SourceError, UsageError

Target = Literal["hf", "pt", "dense"]


def convert_checkpoint(
    checkpoint: Path, to: Target, output: Path, overwrite: bool, shard_bytes: int
) -> int:
    """Convert a checkpoint folder or ``.pt`` file; return the bytes written.

    Raises:
        SourceError: ``checkpoint`` is none.
        UsageError: the name of ``output`` does not fit ``to``.
        OutputError: something stands at ``output``.
    """
    if not checkpoint.exists():
        raise SourceError(f"There is no checkpoint '{checkpoint}'.", "Check the path.")
    if (output.suffix == ".pt") != (to == "pt"):
        raise UsageError(
            f"--to {to} cannot write '{output}'.",
            "A single file ends in .pt; every other form is a folder.",
        )
    if output.resolve() == checkpoint.resolve():
        raise OutputError(f"{output} is the input itself.", "Name another --output.")
    check_output(output, overwrite)
    if checkpoint.is_file() and to == "hf":
        from_pt(checkpoint, output, shard_bytes)
    else:
        with _opened(checkpoint, output) as opened:
            _convert(opened, to, output, shard_bytes)
    if output.is_file():
        return output.stat().st_size
    return sum(path.stat().st_size for path in output.glob("*.safetensors"))


def _convert(checkpoint: Checkpoint, to: Target, output: Path, shard_bytes: int) -> None:
    if to == "pt":
        to_pt(checkpoint, output)
    elif to == "dense":
        to_dense(checkpoint, output, shard_bytes)
    else:
        repack(checkpoint, output, shard_bytes)


@contextmanager
def _opened(checkpoint: Path, output: Path) -> Iterator[Checkpoint]:
    """Open a checkpoint; a ``.pt`` is unpacked beside the output while the body runs: there is
    room, where /tmp may be small."""
    if checkpoint.is_dir():
        yield open_checkpoint(checkpoint)
        return
    home = next(folder for folder in output.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=".hisvd-", dir=home) as scratch:
        yield open_checkpoint(unpacked(checkpoint, Path(scratch) / "unpacked"))
