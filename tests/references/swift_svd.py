"""Swift-SVD: shares by compressibility and importance of the block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.references.common import Ranks, Study, Sublayer, Weights, bisect, snapped

WEIGHT = 0.6
GUARANTEED = 0.5


def swift_svd(study: Study, ratio: float) -> Weights:
    """Swift-SVD (arXiv 2604.01609) with importance weight 0.6, as its released script has it.

    Within a type: half of the uniform rank is certain; the rest is shared in proportion to
    I^0.6 · c^0.4. I is the mean angle between the block's input and output, over all tokens,
    stretched to 1 … 2 over the blocks. c is the normalised effective rank exp(entropy(σ/Σσ))/full
    of the whitened spectrum. A sublayer that reaches break-even is dense, and the others of its
    type share what it cannot use.
    """
    return study.whitened_weights(allocated(study, ratio, effective_rank_share))


def allocated(study: Study, ratio: float, local: Callable[[Study, Sublayer], float]) -> Ranks:
    """Ranks with any measure of how little a sublayer can be compressed."""
    angles = block_angles(study)
    least, most = min(angles), max(angles)
    importance = [1 + (a - least) / (most - least) for a in angles]
    ranks: Ranks = {}
    for members in study.by_kind().values():
        scores = [importance[s.block] ** WEIGHT * local(study, s) ** (1 - WEIGHT) for s in members]
        limit = members[0].break_even
        certain = GUARANTEED * ratio * limit
        shares = _water(scores, ratio * limit * len(members), certain, limit)
        for s, share in zip(members, shares, strict=True):
            ranks[s.name] = snapped(s, share)
    return ranks


def _water(scores: list[float], total: float, certain: float, limit: float) -> list[float]:
    """Ranks that sum to ``total``: certain + λ·score, at most ``limit``."""

    def at(scale: float) -> list[float]:
        return [min(certain + scale * score, limit) for score in scores]

    return at(bisect(lambda scale: sum(at(scale)), total))


def effective_rank_share(study: Study, s: Sublayer) -> float:
    """exp of the entropy of σ/Σσ, over the full rank."""
    sigma = study.whitened[s.name][1]
    share = sigma / sigma.sum()
    return float(torch.exp(-torch.special.xlogy(share, share).sum())) / len(sigma)


def log_of_energy(study: Study, s: Sublayer) -> float:
    """log(1 + ‖W S‖_F): what the released program uses in place of the effective rank."""
    return float(torch.log(1 + study.whitened[s.name][1].norm()))


@torch.no_grad()
def block_angles(study: Study) -> list[float]:
    """Mean angle over π between each block's input and output."""
    angles: dict[nn.Module, float] = {}

    def hook(
        module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor | tuple[Tensor]
    ) -> None:
        after = output if isinstance(output, Tensor) else output[0]
        cosine = nn.functional.cosine_similarity(arguments[0].double(), after.double(), dim=-1)
        angles[module] = float(torch.arccos(cosine.clamp(-1, 1)).mean()) / torch.pi

    handles = [block.register_forward_hook(hook) for block in study.blocks]
    study.model(study.windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return [angles[block] for block in study.blocks]
