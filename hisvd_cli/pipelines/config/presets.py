"""Presets: named combinations of methods, with the settings that their authors published.

Sources are the papers named below and the authors' code. Presets do not quantize, even if the
authors' code does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hisvd_cli.allocation.methods import ALLOCATORS
from hisvd_cli.compression.methods import DECOMPOSERS


@dataclass(frozen=True)
class Preset:
    """A combination of methods.

    Attributes:
        about: description in one line.
        source: paper and year.
        settings: section → key → value, of the settings that it changes.
        low: the same for ``compress``, at keep ratios below ``low_ratio``.
        low_ratio: 0 if all ratios use the same settings.
    """

    about: str
    source: str
    settings: dict[str, dict[str, Any]]
    low: dict[str, Any]
    low_ratio: float

    def at(self, ratio: float | None) -> dict[str, dict[str, Any]]:
        """Return the settings at one keep ratio; None for those that all ratios share."""
        if ratio is None or ratio >= self.low_ratio:
            return self.settings
        return {**self.settings, "compress": {**self.settings["compress"], **self.low}}


def _preset(
    about: str,
    source: str,
    *,
    allocator: str,
    decomposer: str,
    metric: str = "whitened",
    plan: Mapping[str, Any] | None = None,
    compress: Mapping[str, Any] | None = None,
    low: Mapping[str, Any] | None = None,
    low_ratio: float = 0.0,
    set_defaults: bool = True,
) -> Preset:
    """Return a preset that sets the options of its methods to their defaults, if ``set_defaults``,
    so that a profile cannot change the preset. ``plan`` and ``compress`` take precedence."""
    # Only HiSVD has a minimum rank; other presets must not inherit its default.
    general = {"allocator": [allocator], "metric": metric, "min_rank_ratio": 0.0, "storage": "pair"}
    allocation = ALLOCATORS.options(allocator, {}).model_dump() if set_defaults else {}
    factors = DECOMPOSERS.options(decomposer, {}).model_dump() if set_defaults else {}
    settings = {
        "plan": {**general, **allocation, **(plan or {})},
        "compress": {"decomposer": decomposer, **factors, **(compress or {})},
    }
    return Preset(about, source, settings, dict(low or {}), low_ratio)


PRESETS: dict[str, Preset] = {
    "hisvd": _preset(
        "The defaults of hisvd: two-stage allocation of HiSVD",
        "Principled Low-Rank Approximation of LLMs via Hierarchical Modeling of Information "
        "Capacity and Spectral Structure, ACL 2026",
        allocator="hisvd",
        decomposer="whitened",
        plan={"min_rank_ratio": 0.3},
    ),
    # Authors' code: whitening only if at most 0.3 is pruned, with the update of U if more.
    "svd-llm": _preset(
        "Uniform ratio, whitened truncation; updated below keep ratio 0.7",
        "SVD-LLM, ICLR 2025 (arXiv 2403.07378)",
        allocator="uniform",
        decomposer="whitened",
        low={"update": "closed-form"},
        low_ratio=0.7,
    ),
    "svd-llm-v2": _preset(
        "Ratios by theoretical truncation loss within each type",
        "SVD-LLM V2, NAACL 2025 (arXiv 2503.12340)",
        allocator="svdllm-v2",
        decomposer="whitened",
    ),
    # Authors' code: 10 oversamples, 2 power iterations, on the whitened matrix.
    "rsvd-llm": _preset(
        "SVD-LLM with a randomized range finder",
        "RSVD-LLM, 2025, after Halko, Martinsson and Tropp, SIAM Review 2011",
        allocator="uniform",
        decomposer="randomized",
    ),
    # Authors' code: mean absolute input, α 0.5, nine ratios, perplexity on 32 windows.
    "asvd": _preset(
        "Ratios by measured perplexity, inputs scaled by their magnitude",
        "ASVD, 2023 (arXiv 2312.05821)",
        allocator="asvd",
        decomposer="asvd",
        plan={"probe_samples": 32},
    ),
    "fwsvd": _preset(
        "Uniform ratio, rows weighted by diagonal Fisher information",
        "Language model compression with weighted low-rank factorization, ICLR 2022 "
        "(arXiv 2207.00112)",
        allocator="uniform",
        decomposer="fwsvd",
    ),
    "gfwsvd": _preset(
        "Uniform ratio, Kronecker-factored Fisher information of whole sequences",
        "Generalized Fisher-Weighted SVD, 2025 (arXiv 2505.17974)",
        allocator="uniform",
        decomposer="gfwsvd",
    ),
    # Authors' code: minimum rank 0, but 0.3 of break-even at keep ratio 0.4; six stages ("required"
    # for all models but the first, where they also help), each corrected with the gradient of one
    # randomly drawn window. Its stages also take importance from one window, here from all.
    "zs-svd": _preset(
        "Components removed so that predicted changes of the loss cancel, six stages",
        "Zero Sum SVD, ICML 2026 (arXiv 2602.02848)",
        allocator="zero-sum",
        decomposer="whitened",
        compress={
            "stages": 6,
            "correction": "pull-subspace",
            "correction_samples": 1,
            "correction_batches": 1,
        },
    ),
    # Authors' code: KL measured at keep ratio 0.1 on 32 windows, depth factor falling linearly from
    # 1 + 5 to 1 (the start of its search), 0.1 of G and 0.3 of H replaced by their mean diagonal.
    "lems": _preset(
        "Ratios by measured KL divergence and depth, K-FAC metric",
        "Layer-Wise Error Model Search and KFAC-SVD, ICML 2026",
        allocator="lems",
        decomposer="fisher",
        metric="fisher",
        plan={
            "probe_ratio": 0.1,
            "probe_samples": 32,
            "input_shrinkage": 0.1,
            "output_shrinkage": 0.3,
        },
    ),
    # Authors' code: importance weight 0.6 (the paper selects it on held-out text).
    "swift-svd": _preset(
        "Ratios by effective rank and block importance",
        "Swift-SVD, ICML 2026 (arXiv 2604.01609)",
        allocator="swift",
        decomposer="whitened",
    ),
    # The schedule of the authors' code (5120 steps, nearly hard masks) has no counterpart here, so
    # the preset does not set the other options of learned.
    "dobi-svd": _preset(
        "Truncation positions learned by gradient",
        "Dobi-SVD, ICLR 2025 (arXiv 2502.02723)",
        allocator="learned",
        decomposer="whitened",
        plan={"learning_start": "uniform"},
        set_defaults=False,
    ),
    "best": _preset(
        "Best measured combination: optimal ranks, K-FAC metric, pivoted storage",
        "hisvd, 2026",
        allocator="waterfill",
        decomposer="fisher",
        metric="held-out",
        plan={"input_shrinkage": 0.02, "output_shrinkage": 0.1, "storage": "pivoted"},
    ),
}
