"""The dense model and the compressed one, walked side by side over the same text.

Both are the dense model's blocks; in the second the weights of sublayers are replaced as they are
made, by what the checkpoint's factors multiply to. Sublayers are treated in groups that are given
the very same tensor, in the order in which data meets them, so that what enters a group has passed
everything before it in its compressed form.

Legend: S sequences, of L tokens, of this process; n inputs of a sublayer; x enters it in the dense
model, x′ in the compressed one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor, nn

from hisvd_cli.calibration.calibrate import linears_of
from hisvd_cli.calibration.collector import Collector
from hisvd_cli.compression.updates import CrossSum
from hisvd_cli.modeling.block_walk import BlockWalk
from hisvd_cli.utils.distributed import world


class TwoStreams:
    """Two walks over the same tokens, block by block.

    Args:
        dense: the dense model.
        prefix: the same model; its sublayers are replaced on the way.
    """

    def __init__(self, dense: BlockWalk, prefix: BlockWalk) -> None:
        self._dense = dense
        self._prefix = prefix

    def embed(self, tokens: Tensor) -> None:
        """Embed ``tokens [S, L]`` for both."""
        for walk in (self._dense, self._prefix):
            walk.embed(tokens)

    def load(self, index: int) -> None:
        """Fill block ``index`` of both from disk. Raises SourceError, NumericalError."""
        for walk in (self._dense, self._prefix):
            walk.load(index)

    def free(self, index: int) -> None:
        """Give back the memory of block ``index``."""
        for walk in (self._dense, self._prefix):
            walk.free(index)

    def advance(self, index: int) -> None:
        """Run the loaded block ``index`` of both. Raises NumericalError: see ``BlockWalk``."""
        for walk in (self._dense, self._prefix):
            walk.advance(index)

    def groups(self, index: int, names: Collection[str]) -> list[list[str]]:
        """Return which sublayers of the loaded block share an input, in the order of running.

        Args:
            index: the block.
            names: the sublayers that count.
        """
        collector = Collector(linears_of(self._dense, sorted(names)), self._dense.device)

        def probe() -> list[list[str]]:
            with collector.grouping() as found:
                self._dense.probe(index)
            return found

        return world().agreed(probe)

    def measure(self, index: int, group: Collection[str], until: int) -> tuple[CrossSum, CrossSum]:
        """Return the cross moments of a group's input, all before it in its compressed form.

        Args:
            index: the loaded block.
            group: sublayers that share an input.
            until: which of this process's sequences are summed in the first result; the rest is in
                the second.
        """
        dense, other = (linears_of(walk, list(group)) for walk in (self._dense, self._prefix))
        width = next(iter(dense.values())).in_features
        sums = CrossSum(width, self._dense.device), CrossSum(width, self._dense.device)
        for start, x, moved in self._entering(index, list(dense.values()), list(other.values())):
            cut = min(max(until - start, 0), len(x))
            for total, rows in zip(sums, (slice(0, cut), slice(cut, None)), strict=True):
                if len(x[rows]):
                    total.add(x[rows], moved[rows])
        for total in sums:
            total.pool(world().add_up)
        return sums

    def _entering(
        self, index: int, dense: list[nn.Linear], other: list[nn.Linear]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the number of the first sequence of each chunk, its x and its x′ ``[B, L, n]``."""
        for start in range(0, len(self._dense.hidden), self._dense.batch):
            part = slice(start, start + self._dense.batch)
            x = self._dense.entering(index, self._dense.hidden[part], dense)
            moved = self._prefix.entering(index, self._prefix.hidden[part], other)
            # Some blocks (OPT's) join all tokens of a chunk before a sublayer.
            shape = (len(self._dense.hidden[part]), -1, x.shape[-1])
            yield start, x.reshape(shape), moved.reshape(shape)
            for walk in (self._dense, self._prefix):
                walk.home.settle()

    def replace(self, name: str, weight: Tensor) -> None:
        """Put ``weight`` ``[m, n]`` in the place of a sublayer's in the compressed model."""
        linear = self._prefix.model.get_submodule(name)
        made = weight.to(self._prefix.device, self._prefix.dtype)
        linear.weight = nn.Parameter(made, requires_grad=False)
