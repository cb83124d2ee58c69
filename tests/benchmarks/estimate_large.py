"""What large models would take on many GPUs, on paper: bytes and operations a stage, and which
resource bounds it. Nothing is measured: rates are assumptions (below), so figures are too::

    python tests/benchmarks/estimate_large.py

Legend: P processes of one GPU each; d hidden width, f width of the MLP, L blocks; T calibration
tokens. A stage takes as long as its slowest resource; stages follow each other.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass

from hisvd_cli.allocation.estimate import decomposition_cost

# Assumed rates, per second. H200: 989 TFLOP/s dense bf16, 67 float64 tensor, 67 float32 without
# TF32 on paper. Products reach about half to two thirds of that; eigendecompositions far less.
BF16 = 500e12
FLOAT32 = 40e12  # moments: products in float32, without TF32
EIGEN = 5e12  # cost as decomposition_cost counts it (50 n³ for values and vectors), float64
NVLINK = 300e9  # bytes that a reduction takes in and out of a GPU inside a node
NETWORK = 40e9  # the same between nodes, a 400 Gb/s link for each GPU
READ = 5e9  # bytes from a shared file system, for each node
WRITE = 2e9  # bytes that one process writes (calibration: process 0; factors: each its own)
WRITE_ALL = 10e9  # and all of them together
KEEP = 0.6


@dataclass(frozen=True)
class Model:
    """Shapes of a llama-like model, and the machines it is to run on."""

    name: str
    blocks: int
    width: int
    inner: int
    key_values: int
    outside: int
    nodes: int
    gpus: int = 8

    @property
    def processes(self) -> int:
        """P."""
        return self.nodes * self.gpus

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(m, n) of the sublayers of a block: q, k, v, o, gate, up, down."""
        d, kv, f = self.width, self.key_values, self.inner
        return [(d, d), (kv, d), (kv, d), (d, d), (f, d), (f, d), (d, f)]

    @property
    def inside(self) -> int:
        """Parameters of all sublayers."""
        return self.blocks * sum(m * n for m, n in self.shapes)

    @property
    def moments(self) -> int:
        """Entries of a block's moments: inputs of q/k/v, of o, of gate/up; output of down."""
        return 4 * self.width**2


MODELS = [
    Model("70B on 8 × H200", 80, 8192, 28672, 1024, 2 * 128256 * 8192, nodes=1),
    Model("405B on 4 × 8 × H200", 126, 16384, 53248, 1024, 2 * 128256 * 16384, nodes=4),
]


@dataclass(frozen=True)
class Stage:
    """A stage: operations of all processes, bytes moved, and the seconds of each resource."""

    name: str
    flops: float
    bytes: float
    seconds: dict[str, float]

    def line(self) -> str:
        """Return a row of the table."""
        bound = max(self.seconds, key=lambda name: self.seconds[name])
        return (
            f"{self.name:22} {self.flops:9.2e} {self.bytes / 1e9:9.0f} GB "
            f"{self.seconds[bound]:8.0f} s  {bound}"
        )


def stages_of(model: Model, samples: int, seqlen: int) -> list[Stage]:
    """Return the stages of calibrating and compressing a model."""
    tokens = samples * seqlen
    p, weights = model.processes, 2 * (model.inside + model.outside)
    attention = 2 * 2 * tokens * seqlen * model.width * model.blocks / 2  # causal
    forward = 2 * tokens * model.inside + attention
    products = 2 * tokens * model.moments * model.blocks
    sums = 8 * model.moments * model.blocks  # float64
    link = NVLINK if model.nodes == 1 else NETWORK
    kept = 4 * model.moments * model.blocks  # float32 on disk
    rounds = math.ceil(7 * model.blocks / p) * p / (7 * model.blocks)  # sublayers do not split
    cost = sum(decomposition_cost(shape) for shape in model.shapes) * model.blocks
    again = kept * 7 / 4 + weights  # read for seven sublayers, some of which share a moment
    made = KEEP * 2 * model.inside + 2 * model.outside
    eigen = {"eigendecompositions": cost / 2 / p * rounds / EIGEN}
    return [
        Stage("read weights", 0, weights * model.nodes, {"disk": weights / READ}),
        Stage("forward pass", forward, 0, {"bf16 products": forward / p / BF16}),
        Stage("moment products", products, 0, {"float32 products": products / p / FLOAT32}),
        Stage("reduce moments", 0, sums, {"interconnect": sums / link}),
        Stage("write moments", 0, kept, {"disk (process 0)": kept / WRITE}),
        Stage(
            "spectra",
            cost / 2,
            again,
            {**eigen, "disk": again / model.nodes / READ},
        ),
        Stage(
            "factors",
            cost / 2,
            again,
            {**eigen, "disk": again / model.nodes / READ},
        ),
        Stage("write factors", 0, made, {"disk": made / WRITE_ALL}),
        Stage("join into shards", 0, 2 * made, {"disk (process 0)": made / READ + made / WRITE}),
    ]


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seqlen", type=int, default=2048)
    given = parser.parse_args()
    for model in MODELS:
        stages = stages_of(model, given.samples, given.seqlen)
        sys.stdout.write(f"{model.name}, {given.samples} × {given.seqlen} tokens, keep {KEEP}\n")
        sys.stdout.write(f"{'stage':22} {'FLOP':>9} {'moved':>12} {'time':>10}  bound by\n")
        for stage in stages:
            sys.stdout.write(stage.line() + "\n")
        total = sum(max(stage.seconds.values()) for stage in stages)
        hidden = 2 * given.samples * given.seqlen * model.width / model.processes / 1e9
        block = 2 * model.inside / model.blocks / 1e9
        sums = 8 * model.moments / 1e9
        sys.stdout.write(
            f"{'all':22} {'':9} {'':12} {total:8.0f} s; of a GPU's memory: hidden states "
            f"{hidden:.1f} GB, a block {block:.1f} GB, its moments {sums:.1f} GB\n\n"
        )


if __name__ == "__main__":
    main()
