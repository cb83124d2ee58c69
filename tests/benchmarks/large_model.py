"""A model larger than the memory it is given: peak memory, and the same bytes as without a bound.

Makes a random llama-shaped model in bfloat16, written block by block, then calibrates and
compresses it twice through the command, without a bound and with ``--max-memory``; prints a line
for each stage and the peak of its process (VmHWM), and compares the sha256 of all files but those
that say how long it took. The model of the issue, 8 GB on disk, and one of a tenth of that::

    python -m tests.benchmarks.large_model out/ --gigabytes 8 --width 4096 --max-memory 3GB
    python -m tests.benchmarks.large_model out/ --gigabytes 0.8 --width 1536 --max-memory 1GB

What it writes (twice the model and more) is removed at the end; ``--keep`` leaves it there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY = 32_000
STAGES = ("calibrate", "compress")


def make_model(folder: Path, gigabytes: float, width: int) -> int:
    """Write a random model of about that size, a shard a block; return the number of blocks."""
    inner = round(width * 2.6875 / 64) * 64  # 11008 for 4096
    block = 2 * (4 * width**2 + 3 * width * inner)
    count = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * width) / block))
    folder.mkdir(parents=True)
    transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=count,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 128,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ).save_pretrained(folder)
    _save_tokenizer(folder)
    where = {}
    for file, tensors in _shards(count, width, inner):
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, file))
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return count


def _save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of as many words as the model has embeddings: with a handful of them, all
    inputs would lie in as few directions, which no real text does."""
    words = {"<s>": 0} | {_word(i): i for i in range(1, VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>"
    ).save_pretrained(folder)


def _word(i: int) -> str:
    return f"word{i}"


def random_text(words: int) -> str:
    """Return a text of that many words, each as likely as any other."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(1, VOCABULARY, (words,), generator=generator).tolist()
    return " ".join(map(_word, drawn))


def _shards(count: int, width: int, inner: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)

    def draw(m: int, n: int, scale: float) -> Tensor:
        noise = torch.empty(m, n, dtype=torch.bfloat16).normal_(generator=generator)
        return noise.mul_(scale)

    yield (
        "outside.safetensors",
        {
            "model.embed_tokens.weight": draw(VOCABULARY, width, 1.0),
            "model.norm.weight": torch.ones(width, dtype=torch.bfloat16),
            "lm_head.weight": draw(VOCABULARY, width, width**-0.5),
        },
    )
    shapes = {
        **{f"self_attn.{x}_proj": (width, width) for x in "qkvo"},
        **{f"mlp.{x}_proj": (inner, width) for x in ("gate", "up")},
        "mlp.down_proj": (width, inner),
    }
    for i in range(count):
        norms = ("input_layernorm", "post_attention_layernorm")
        block = {name: torch.ones(width, dtype=torch.bfloat16) for name in norms}
        block |= {name: draw(m, n, n**-0.5) for name, (m, n) in shapes.items()}
        named = {f"model.layers.{i}.{name}.weight": tensor for name, tensor in block.items()}
        yield f"block-{i:05d}.safetensors", named


def run(words: Sequence[object], folder: Path) -> tuple[int, float, dict[str, Any]]:
    """Run a command of hisvd; return its peak memory in bytes, its seconds, and its document."""
    started = time.monotonic()
    command = [sys.executable, "-m", "hisvd_cli", *map(str, words), "--json"]
    environment = {**os.environ, "HISVD_CACHE": str(folder / "cache")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, _peak(process.pid))
            time.sleep(0.1)
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        sys.exit(process.returncode)
    return peak, time.monotonic() - started, json.loads(output)


def _peak(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def pipeline(folder: Path, given: argparse.Namespace, bound: str | None) -> dict[str, str]:
    """Calibrate and compress, print both; return file → sha256 of all that was written, but for how
    long it took."""
    made = folder / (bound or "unbounded")
    common = ["--model", folder / "model", "--dataset", folder / "text.txt"]
    common += ["--samples", given.samples, "--seqlen", given.seqlen, "--batch", given.batch]
    common += ["--calibration", made / "calibration"]
    common += ["--max-memory", bound] if bound else []
    own = ["--ratio", "0.6", "--output", made / "compressed"]
    own += ["--allocator", given.allocator]
    own += [word for pattern in given.include for word in ("--include", pattern)]
    for stage in STAGES[: 1 if given.only_calibrate else 2]:
        peak, seconds, document = run([stage, *common, *(own if stage == "compress" else [])], made)
        parts = document["seconds"] if stage == "compress" else ""
        sys.stdout.write(
            f"{made.name:>10} {stage:<10} peak {peak / 1e9:.2f} GB  {seconds:.0f} s  {parts}\n"
        )
        sys.stdout.flush()
    return {
        str(path.relative_to(made)): _sha256(path)
        for path in sorted(made.rglob("*"))
        if path.is_file() and path.parent.name != "times"
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def main() -> None:
    """Parse arguments, make the model, measure, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="folder for the model and what comes of it")
    parser.add_argument("--gigabytes", type=float, default=0.8, help="size of the model on disk")
    parser.add_argument("--width", type=int, default=1536, help="hidden width, a multiple of 128")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-memory", default="1GB")
    parser.add_argument("--allocator", default="hisvd", help="uniform needs no spectra")
    parser.add_argument("--include", nargs="*", default=[], help="sublayers to factor; else all")
    parser.add_argument("--only-calibrate", action="store_true", help="leave out compress")
    parser.add_argument("--keep", action="store_true", help="leave everything in the folder")
    parser.add_argument("--bounds", nargs="*", help="'' for none; by default none, then the bound")
    given = parser.parse_args()
    folder: Path = given.output
    if not (folder / "model").is_dir():
        count = make_model(folder / "model", given.gigabytes, given.width)
        size = sum(path.stat().st_size for path in (folder / "model").iterdir())
        sys.stdout.write(f"{count} blocks of width {given.width}, {size / 1e9:.2f} GB\n")
        (folder / "text.txt").write_text(random_text(given.samples * given.seqlen * 2))
    bounds = ["", given.max_memory] if given.bounds is None else given.bounds
    found = [pipeline(folder, given, bound or None) for bound in bounds]
    names = sorted({name for files in found for name in files})
    other = [name for name in names if len({files.get(name) for files in found}) > 1]
    sys.stdout.write(f"{len(names)} files, {', '.join(other) or 'none'} differ\n")
    if not given.keep:
        shutil.rmtree(folder)
    sys.exit(bool(other))


if __name__ == "__main__":
    main()
