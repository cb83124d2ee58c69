"""Factors sublayers block by block, fitted to their inputs in the compressed model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hisvd_cli.calibration.store import Sample
from hisvd_cli.compression.layout import block_number
from hisvd_cli.compression.paired_walk import PairedWalk
from hisvd_cli.compression.parts import PartBuilder, PartInputs
from hisvd_cli.compression.updates import (
    DAMPINGS,
    CrossMoment,
    least,
    output_energy,
    output_error,
    refitted,
    transfer,
    updated_statistics,
)
from hisvd_cli.linalg.statistics import Statistics
from hisvd_cli.modeling.block_walk import BlockWalk
from hisvd_cli.modeling.hidden_states import Place, StatesHome
from hisvd_cli.modeling.layers.lowrank import dense_product
from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.files.safetensors_header import dtype_name
from hisvd_cli.utils.files.tensorfile import AGAIN, read_tensors, write_tensors
from hisvd_cli.utils.progress import Reporter

UpdateMethod = Literal["closed-form", "propagated"]
_HELD_BACK = 4
"""One in so many sequences is held out to select a damping."""


@dataclass(frozen=True)
class Update:
    """Method of the update, and how to run the model.

    Attributes:
        method: see :mod:`hisvd_cli.compression.updates`.
        damping: λ; None selects it on held-out sequences (the last quarter), for each group of
            sublayers with a common input, or for each sublayer with ``closed-form``.
        sample: the tokens.
        device: device of the blocks.
        dtype: dtype of the blocks.
        batch: sequences per forward pass.
        place: location of the hidden states of both models.
    """

    method: UpdateMethod
    damping: float | None
    sample: Sample
    device: torch.device
    dtype: torch.dtype
    batch: int
    place: Place = "device"

    @property
    def held_back(self) -> int:
        """Number of held-out sequences at the end."""
        count = len(self.sample.tokens)
        return 0 if self.damping is not None else max(1, count // _HELD_BACK)

    def record(self) -> dict[str, object]:
        """Return the entry for the provenance."""
        samples, seqlen = self.sample.tokens.shape
        return {
            "method": self.method,
            "damping": self.damping,
            "held_back": self.held_back,
            "samples": samples,
            "seqlen": seqlen,
            "tokens_sha256": self.sample.key,
            "dtype": dtype_name(self.dtype),
        }


class Updating:
    """Builds the parts of updated sublayers.

    Args:
        update: method of the update.
        builder: decomposes weights.
        parts: sublayer → part.
        home: folder of the parts, with those of an interrupted run.
    """

    def __init__(
        self, update: Update, builder: PartBuilder, parts: Mapping[str, str], home: Path
    ) -> None:
        self._update = update
        self._builder = builder
        self._parts = parts
        self._home = home

    def run(self, left: Sequence[str], reporter: Reporter) -> None:
        """Build the parts ``left``. Several processes share the sequences; the first one factors.

        Raises:
            SourceError: a file is missing or damaged.
            NumericalError: an activation or a factor is not finite.
            OutputError: a file cannot be written.
        """
        wanted = set(left)
        last = max((block_number(part) for part in wanted), default=-1)
        if last < 0:
            return
        streams = self._open()
        with reporter.stage("Updating blocks", last + 1) as step:
            for index in range(last + 1):
                streams.load(index)
                mine = [n for n, part in self._parts.items() if block_number(part) == index]
                self._replace_stacks(streams, index)
                for group in streams.groups(index, mine) if mine else []:
                    missing = [name for name in group if self._parts[name] in wanted]
                    if missing:
                        self._make(streams, index, group, missing)
                    for name in group:
                        streams.replace(name, self._weight(name))
                if index < last:
                    streams.advance(index)
                streams.free(index)
                step()

    def _replace_stacks(self, streams: PairedWalk, index: int) -> None:
        """Replace the experts of a block, which are built before and without an update."""
        for part, made in self._builder.parts.items():
            factored = made.factored
            if factored and factored.stacked and block_number(part) == index:
                tensors, _ = read_tensors(self._home / f"{part}.part", AGAIN)
                names = factored.tensors("pair")
                for i, member in enumerate(factored.weights):
                    v, u = (tensors[name][i].float() for name in names)
                    streams.replace(member, u @ v)

    def _open(self) -> PairedWalk:
        update, rows = self._update, world().share(len(self._update.sample.tokens))

        def walk() -> BlockWalk:
            home = StatesHome(update.device, update.place, self._home)
            return BlockWalk(self._builder.source, update.device, update.dtype, update.batch, home)

        streams = PairedWalk(walk(), walk())
        streams.embed(update.sample.tokens[rows.start : rows.stop])
        return streams

    def _make(
        self, streams: PairedWalk, index: int, group: Sequence[str], missing: Sequence[str]
    ) -> None:
        """Write the missing parts of a group."""
        here, count = world(), len(self._update.sample.tokens)
        until = count - self._update.held_back - here.share(count).start
        fit, held = streams.measure(index, group, until)
        if here.first:
            judged = (fit.mean(), held.mean()) if held.tokens else None
            fit.absorb(held)
            group_of = {name: self._builder.read(self._parts[name]) for name in group}
            make = self._closed_form if self._update.method == "closed-form" else self._propagated
            made = make(group_of, missing, fit.mean(), judged)
            for name, tensors in made:
                write_tensors(self._home / f"{self._parts[name]}.part", tensors, {})
        here.wait()

    def _propagated(
        self,
        group: Mapping[str, PartInputs],
        missing: Sequence[str],
        moments: CrossMoment,
        judged: tuple[CrossMoment, CrossMoment] | None,
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield the tensors of each missing sublayer: the truncation of W K."""
        weights = {name: self._weight_of(name, each) for name, each in group.items()}
        damping = self._damping(partial(_loss_of_transfer, list(weights.values())), judged)
        transferred = transfer(moments, damping)
        for name in missing:
            weight, known = weights[name], group[name].known.get(name, Statistics())
            if not math.isinf(damping):
                known = updated_statistics(known, transferred, moments)
            u, v = self._builder.decomposed(name, weight.double() @ transferred, known)
            yield name, self._builder.stored(name, u, v, weight.dtype)

    def _closed_form(
        self,
        group: Mapping[str, PartInputs],
        missing: Sequence[str],
        moments: CrossMoment,
        judged: tuple[CrossMoment, CrossMoment] | None,
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield the tensors of each missing sublayer: V of the decomposer, and U fitted to it."""
        for name in missing:
            weight, known = self._weight_of(name, group[name]), group[name].known
            pair = self._builder.decomposed(name, weight, known.get(name, Statistics()))
            damping = self._damping(partial(_loss_of_refit, weight, pair), judged)
            u = refitted(weight, pair, moments, damping)
            yield name, self._builder.stored(name, u, pair[1], weight.dtype)

    def _damping(
        self,
        loss: Callable[[CrossMoment, CrossMoment, float], float],
        judged: tuple[CrossMoment, CrossMoment] | None,
    ) -> float:
        """Return the damping with the least loss on held-out sequences, or the given one."""
        if judged is None:
            return self._update.damping or 0.0
        return least(partial(loss, *judged), DAMPINGS)

    def _weight_of(self, name: str, material: PartInputs) -> Tensor:
        return self._builder.weight_of(name, self._parts[name], material)

    def _weight(self, name: str) -> Tensor:
        """Return the product of the finished factors of a sublayer."""
        path = self._home / f"{self._parts[name]}.part"
        tensors, _ = read_tensors(path, AGAIN)
        return dense_product({key.rpartition(".")[2]: t for key, t in tensors.items()})


def _loss_of_transfer(
    weights: Sequence[Tensor], fit: CrossMoment, held: CrossMoment, damping: float
) -> float:
    """Return the sum of relative output errors on held-out sequences."""
    transferred = transfer(fit, damping)
    return sum(
        output_error(w, w.double() @ transferred, held) / output_energy(w, held) for w in weights
    )


def _loss_of_refit(
    weight: Tensor,
    pair: tuple[Tensor, Tensor],
    fit: CrossMoment,
    held: CrossMoment,
    damping: float,
) -> float:
    """Return the output error on held-out sequences."""
    return output_error(weight, refitted(weight, pair, fit, damping) @ pair[1].double(), held)
