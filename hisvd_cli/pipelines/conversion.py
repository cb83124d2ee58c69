"""Converts and quantizes checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from hisvd_cli.export.convert import conversion_key, from_pt, repack, to_pt, unpacked
from hisvd_cli.export.dense import to_dense
from hisvd_cli.modeling.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hisvd_cli.modeling.sources.companions import warn_of_links
from hisvd_cli.pipelines.compressing.quantization import check_quantization, quantize_checkpoint
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.output_names import inputs_of
from hisvd_cli.pipelines.outputs import check_output
from hisvd_cli.utils.errors import SourceError, UsageError
from hisvd_cli.utils.files.scratch import scratch_folder
from hisvd_cli.utils.progress import Reporter

Target = Literal["hf", "pt", "dense"]


def write_form(
    resolved: Resolved,
    checkpoint: Path,
    to: Target,
    output: Path,
    overwrite: bool,
    reporter: Reporter,
) -> int:
    """Write a checkpoint in another format, quantized if a flag requests it; return the bytes.

    Raises:
        UsageError: quantization is requested for a dense model.
        HisvdError: see :func:`convert_checkpoint` and :func:`quantize_checkpoint`.
    """
    check_quantization(resolved)
    if _quantizes(resolved):
        return _quantize_to(resolved, checkpoint, to, output, overwrite, reporter)
    if checkpoint.is_dir():
        warn_of_links(checkpoint, reporter)
    shard_bytes = int(resolved.settings.compress.max_shard_size * 1e9)
    scratch = resolved.settings.model.scratch
    return convert_checkpoint(checkpoint, to, output, overwrite, shard_bytes, scratch)


def convert_checkpoint(
    checkpoint: Path,
    to: Target,
    output: Path,
    overwrite: bool,
    shard_bytes: int,
    scratch: str | None = None,
) -> int:
    """Convert a checkpoint folder or ``.pt`` file; return the bytes written.

    Args:
        checkpoint: the folder or file.
        to: the format.
        output: the folder or file to write.
        overwrite: replace an existing output.
        shard_bytes: maximum size of a weight file.
        scratch: folder for temporary files; by default one in the cache.

    Raises:
        SourceError: ``checkpoint`` is not a checkpoint.
        UsageError: the name of ``output`` does not match ``to``.
        OutputError: ``output`` exists or cannot be written.
    """
    _check_paths(checkpoint, to, output, overwrite)
    if checkpoint.is_file() and to == "hf":
        from_pt(checkpoint, output, shard_bytes)
    else:
        with _opened(checkpoint, scratch) as opened:
            _convert(opened, to, output, shard_bytes)
    return bytes_of(output)


def _quantizes(resolved: Resolved) -> bool:
    """Return whether a flag requests quantization; a profile's ``bits`` are for compress only."""
    return resolved.is_flag("quantize", "bits") and resolved.settings.quantize.bits != "none"


def _quantize_to(
    resolved: Resolved,
    checkpoint: Path,
    to: Target,
    output: Path,
    overwrite: bool,
    reporter: Reporter,
) -> int:
    """Write a quantized checkpoint folder or ``.pt`` file; return the bytes written."""
    if to == "dense":
        raise UsageError(
            "`quantize.bits` writes a quantized low-rank checkpoint, and `to` dense a plain model.",
            "Leave out `to` dense, or `quantize.bits`.",
        )
    _check_paths(checkpoint, to, output, overwrite, inputs_of(resolved))
    scratch = resolved.settings.model.scratch
    with _opened(checkpoint, scratch) as opened:
        if to == "hf":
            quantize_checkpoint(resolved, opened, output, None, reporter)
        else:
            with scratch_folder(scratch) as folder:
                made = folder / "quantized"
                quantize_checkpoint(resolved, opened, made, None, reporter)
                to_pt(open_checkpoint(made), output)
    return bytes_of(output)


def _check_paths(
    checkpoint: Path, to: Target, output: Path, overwrite: bool, inputs: Iterable[Path] = ()
) -> None:
    if not checkpoint.exists():
        raise SourceError(f"There is no checkpoint '{checkpoint}'.", "Check the path.")
    if (output.suffix == ".pt") != (to == "pt"):
        raise UsageError(
            f"`to={to}` cannot write `output={output}`.",
            "A single file ends in .pt; every other format is a folder.",
        )
    check_output(output, overwrite, [checkpoint, *inputs])


def bytes_of(output: Path) -> int:
    """Return the size of the weights in a folder, or of a single file."""
    if output.is_file():
        return output.stat().st_size
    return sum(path.stat().st_size for path in output.glob("*.safetensors"))


def _convert(checkpoint: Checkpoint, to: Target, output: Path, shard_bytes: int) -> None:
    if to == "pt":
        to_pt(checkpoint, output)
    elif to == "dense":
        key = conversion_key("dense", checkpoint, shard_bytes)
        to_dense(checkpoint, output, key, shard_bytes)
    else:
        repack(checkpoint, output, shard_bytes)


@contextmanager
def _opened(checkpoint: Path, scratch: str | None) -> Iterator[Checkpoint]:
    """Open a checkpoint; a ``.pt`` file is unpacked into a temporary folder for the body."""
    if checkpoint.is_dir():
        yield open_checkpoint(checkpoint)
        return
    with scratch_folder(scratch) as folder:
        yield open_checkpoint(unpacked(checkpoint, folder / "unpacked"))
