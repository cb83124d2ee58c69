"""Forward passes of the dense and the compressed model, block by block, over the same text.

Both start as the dense model. In the second, weights of sublayers are replaced by the product of
their factors as soon as these are computed. Sublayers with the same input form a group; groups are
processed in forward order, so that the input of a group comes from compressed sublayers.

Legend: S sequences of L tokens of this process; n inputs of a sublayer; x its input in the dense
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


class PairedWalk:
    """Two block-by-block forward passes over the same tokens.

    Args:
        dense: the dense model.
        prefix: the same model, whose sublayers are replaced.
    """

    def __init__(self, dense: BlockWalk, prefix: BlockWalk) -> None:
        self._dense = dense
        self._prefix = prefix

    def embed(self, tokens: Tensor) -> None:
        """Embed ``tokens [S, L]`` in both."""
        for walk in (self._dense, self._prefix):
            walk.embed(tokens)

    def load(self, index: int) -> None:
        """Load block ``index`` of both from disk. Raises SourceError, NumericalError."""
        for walk in (self._dense, self._prefix):
            walk.load(index)

    def free(self, index: int) -> None:
        """Free the memory of block ``index``."""
        for walk in (self._dense, self._prefix):
            walk.free(index)

    def advance(self, index: int) -> None:
        """Run the loaded block ``index`` of both. Raises NumericalError, see ``BlockWalk``."""
        for walk in (self._dense, self._prefix):
            walk.advance(index)

    def groups(self, index: int, names: Collection[str]) -> list[list[str]]:
        """Return the groups of sublayers that share an input, in forward order.

        Args:
            index: the loaded block.
            names: the sublayers to group.
        """
        collector = Collector(linears_of(self._dense, sorted(names)), self._dense.device)

        def probe() -> list[list[str]]:
            with collector.grouping() as found:
                self._dense.probe(index)
            return found

        return world().agreed(probe)

    def measure(self, index: int, group: Collection[str], until: int) -> tuple[CrossSum, CrossSum]:
        """Return the cross moments of a group's input.

        Args:
            index: the loaded block.
            group: sublayers that share an input.
            until: number of sequences of this process that the first result sums; the second sums
                the others.
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
        """Yield, for each chunk, the index of its first sequence, x and x′ ``[B, L, n]``."""
        for start in range(0, len(self._dense.hidden), self._dense.batch):
            part = slice(start, start + self._dense.batch)
            x = self._dense.entering(index, start, self._dense.hidden[part], dense)
            moved = self._prefix.entering(index, start, self._prefix.hidden[part], other)
            # Some blocks (of OPT) flatten all tokens of a chunk before a sublayer.
            shape = (len(self._dense.hidden[part]), -1, x.shape[-1])
            yield start, x.reshape(shape), moved.reshape(shape)
            for walk in (self._dense, self._prefix):
                walk.home.settle()

    def replace(self, name: str, weight: Tensor) -> None:
        """Replace the weight ``[m, n]`` of a sublayer in the compressed model."""
        linear = self._prefix.model.get_submodule(name)
        made = weight.to(self._prefix.device, self._prefix.dtype)
        linear.weight = nn.Parameter(made, requires_grad=False)
