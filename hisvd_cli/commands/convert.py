"""``hisvd convert``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from hisvd_cli.options import Run, option, with_settings


@with_settings([("compress", "max_shard_size")])
def convert(
    run: Run,
    checkpoint: Annotated[
        Path,
        typer.Argument(help="Checkpoint folder, or a .pt file of hisvd.", metavar="CHECKPOINT"),
    ],
    to: Annotated[
        Literal["hf", "pt", "dense"],
        option(
            "--to",
            text="hf: low-rank folder; pt: one file; dense: plain model, pairs multiplied.",
            metavar="FORM",
        ),
    ],
    output: Annotated[
        Path, option("--output", "-o", text="Folder or file to write.", metavar="PATH")
    ],
    overwrite: Annotated[bool, option("--overwrite", text="Replace what stands there.")] = False,
) -> None:
    """Write a checkpoint in another form, shard by shard.

    Example: hisvd convert demo-0.6 --to dense --output demo-dense
    """
    from hisvd_cli.build.conversion import convert_checkpoint
    from hisvd_cli.views import size_text

    shard_bytes = int(run.settings.compress.max_shard_size * 1e9)
    size = convert_checkpoint(checkpoint, to, output, overwrite, shard_bytes)
    run.console.show(f"{output}: {size_text(size)}")
    run.console.result({"output": str(output), "to": to, "bytes": size}, str(output))
    following = "inspect" if to == "pt" else "eval"
    run.console.next_command(f"hisvd {following} {shlex.quote(str(output))}")
