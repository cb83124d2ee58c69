"""``hisvd convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from hisvd_cli.options import Run, with_settings


@with_settings([("compress", "max_shard_size")])
def convert(
    run: Run,
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, or a .pt file of hisvd.")],
    to: Annotated[
        Literal["hf", "pt", "dense"],
        typer.Option(
            "--to", help="hf: low-rank folder; pt: one file; dense: plain model, pairs multiplied."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder or file to write.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what stands there.")
    ] = False,
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
    run.console.next_command(f"hisvd eval {output}" if to != "pt" else f"hisvd inspect {output}")
