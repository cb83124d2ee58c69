"""``hisvd convert``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hisvd_cli.cli.options import Run, option, with_settings
from hisvd_cli.pipelines.config.commands import SETTINGS
from hisvd_cli.utils.errors import UsageError
from hisvd_cli.utils.files.cache import expanded
from hisvd_cli.utils.quantities import size_text


@with_settings(SETTINGS["convert"])
def convert(
    run: Run,
    checkpoint: Annotated[
        Path,
        typer.Argument(help="Checkpoint folder, or a .pt file of hisvd.", metavar="CHECKPOINT"),
    ],
    to: Annotated[
        Literal["hf", "pt", "dense"] | None,
        option(
            "--to",
            text="hf: low-rank folder; pt: single file; dense: ordinary model, factors multiplied.",
            metavar="FORM",
        ),
    ] = None,
    output: Annotated[
        Path | None, option("--output", "-o", text="Folder or file to write.", metavar="PATH")
    ] = None,
    overwrite: Annotated[bool, option("--overwrite", text="Overwrite an existing output.")] = False,
    push_to_hub: Annotated[
        str | None,
        option(
            "--push-to-hub",
            text="Upload the output of --to, or the checkpoint itself, to this repository.",
            metavar="REPO",
        ),
    ] = None,
    private: Annotated[
        bool, option("--private", text="Create the Hub repository as private.")
    ] = False,
    revision: Annotated[
        str | None,
        option("--revision", text="Hub branch to upload to.", metavar="BRANCH"),
    ] = None,
) -> None:
    """Convert a checkpoint to another format, or upload it to the Hub.

    Examples: hisvd convert demo-0.6 --to dense --output demo-dense

    hisvd convert demo-0.6 --quantize int8 --output demo-0.6-int8

    hisvd convert demo-0.6 --push-to-hub me/demo-0.6
    """
    from hisvd_cli.pipelines.conversion import write_form
    from hisvd_cli.pipelines.output_names import output_name
    from hisvd_cli.pipelines.publishing import Hub, check_request, publish
    from hisvd_cli.pipelines.unused_options import check_options

    output = output and output_name(output)
    checkpoint = expanded(str(checkpoint))
    hub = Hub(push_to_hub, private, revision) if push_to_hub else None
    if hub is None and (private or revision):
        raise UsageError("--private and --revision need --push-to-hub.", "Add --push-to-hub REPO.")
    if to is None and run.resolved.is_flag("quantize", "bits"):
        to = "hf"
    check_options(run.resolved, "convert")
    check_request(checkpoint, to, output, hub)
    document: dict[str, Any] = {"output": str(output or checkpoint)}
    line = str(output)
    if to is not None and output is not None:
        size = write_form(run.resolved, checkpoint, to, output, overwrite, run.console)
        run.console.show(f"{output}: {size_text(size)}")
        document |= {"to": to, "bytes": size}
    if hub is not None:
        line = publish(output or checkpoint, hub, run.console)
        run.console.show(line)
        document["url"] = line
    run.console.result(document, line)
    if output is not None:
        following = "inspect" if to == "pt" else "eval"
        run.console.next_command(f"hisvd {following} {shlex.quote(str(output))}")
