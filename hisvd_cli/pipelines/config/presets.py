"""Presets: named combinations of methods, with the defaults that their authors published.

What was read for them: the papers named below, and the programs that go with them. Where a program
also quantises what it stores, the preset leaves that to ``--quantize``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A combination of methods.

    Attributes:
        about: what it does, in a line.
        source: paper and year.
        settings: section → key → value; whatever it does not name stays as it is.
        low: the same for ``compress`` alone, at keep ratios below ``low_ratio``.
        low_ratio: 0 where there is no such difference.
    """

    about: str
    source: str
    settings: dict[str, dict[str, Any]]
    low: dict[str, Any]
    low_ratio: float

    def at(self, ratio: float | None) -> dict[str, dict[str, Any]]:
        """Return the settings at one keep ratio; None for what all ratios share."""
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
) -> Preset:
    # Only HiSVD has a floor of ranks; the others must not inherit its default. Uniform shares are
    # above any floor. All but best write plain pairs.
    chosen = {
        **{"allocator": [allocator], "metric": metric, "min_rank_ratio": 0.0, "storage": "pair"},
        **(plan or {}),
    }
    factored = {"decomposer": decomposer, **(compress or {})}
    settings = {"plan": chosen, "compress": factored}
    return Preset(about, source, settings, dict(low or {}), low_ratio)


PRESETS: dict[str, Preset] = {
    "hisvd": _preset(
        "The defaults of this tool: HiSVD's two stages",
        "Principled Low-Rank Approximation of LLMs via Hierarchical Modeling of Information "
        "Capacity and Spectral Structure, ACL 2026",
        allocator="hisvd",
        decomposer="whitened",
        plan={
            "min_rank_ratio": 0.3,
            "rank_method": "stable",
            "alpha": 0.5,
            "spectrum": "weight",
            "modulation": "logarithmic",
            "lwe_strength": 2.0,
            "tail_redundancy_weight": 30.0,
        },
    ),
    # Program: whitening alone where at most 0.3 is pruned, with the update of U where more is.
    "svd-llm": _preset(
        "The same share everywhere, whitened truncation; updated below keep 0.7",
        "SVD-LLM, ICLR 2025 (arXiv 2403.07378)",
        allocator="uniform",
        decomposer="whitened",
        low={"update": "closed-form"},
        low_ratio=0.7,
    ),
    "svd-llm-v2": _preset(
        "Shares by theoretical truncation loss within each type",
        "SVD-LLM V2, NAACL 2025 (arXiv 2503.12340)",
        allocator="svdllm-v2",
        decomposer="whitened",
    ),
    # Program: 10 oversamples, 2 power iterations, on the whitened matrix.
    "rsvd-llm": _preset(
        "SVD-LLM with a randomized range finder",
        "RSVD-LLM, 2025, after Halko, Martinsson and Tropp, SIAM Review 2011",
        allocator="uniform",
        decomposer="randomized",
        compress={"weighting": "whitened", "oversamples": 10, "power_iterations": 2},
    ),
    # Program: mean absolute input, α 0.5, nine ratios, perplexity on 32 windows.
    "asvd": _preset(
        "Shares by measured perplexity, inputs scaled by their size",
        "ASVD, 2023 (arXiv 2312.05821)",
        allocator="asvd",
        decomposer="asvd",
        plan={
            "sensitivity_ratios": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
            "probe_samples": 32,
        },
        compress={"asvd_alpha": 0.5},
    ),
    "fwsvd": _preset(
        "The same share everywhere, rows weighted by diagonal Fisher",
        "Language model compression with weighted low-rank factorization, ICLR 2022 "
        "(arXiv 2207.00112)",
        allocator="uniform",
        decomposer="fwsvd",
    ),
    "gfwsvd": _preset(
        "The same share everywhere, Kronecker-factored Fisher of whole sequences",
        "Generalized Fisher-Weighted SVD, 2025 (arXiv 2505.17974)",
        allocator="uniform",
        decomposer="gfwsvd",
    ),
    # Program: floor 0, but 0.3 of the break-even rank at keep 0.4; six stages ("required"
    # for all models but its first, and better for that), corrected by the gradient of one window,
    # drawn for each stage; its stages take importance from one window too, here from all.
    "zs-svd": _preset(
        "Components chosen so that predicted changes of the loss cancel, six stages",
        "Zero Sum SVD, ICML 2026 (arXiv 2602.02848)",
        allocator="zero-sum",
        decomposer="whitened",
        plan={"selection": "zero-sum"},
        compress={
            "stages": 6,
            "correction": "pull-subspace",
            "correction_samples": 1,
            "correction_batches": 1,
        },
    ),
    # Program: KL measured at keep 0.1 on 32 windows, depth factor falling evenly from 1 + 5 to 1
    # (the start of its search), 0.1 of G and 0.3 of H replaced by their mean diagonal.
    "lems": _preset(
        "Shares by measured KL and depth, K-FAC metric",
        "Layer-Wise Error Model Search and KFAC-SVD, ICML 2026",
        allocator="lems",
        decomposer="fisher",
        metric="fisher",
        plan={
            "probe_ratio": 0.1,
            "depth_factor": 5.0,
            "probe_samples": 32,
            "input_shrinkage": 0.1,
            "output_shrinkage": 0.3,
        },
    ),
    # Program: importance weight 0.6 (the paper takes the best of several on held-out text).
    "swift-svd": _preset(
        "Shares by effective rank and importance of the block",
        "Swift-SVD, ICML 2026 (arXiv 2604.01609)",
        allocator="swift",
        decomposer="whitened",
        plan={"importance_weight": 0.6},
    ),
    # The program's schedule (5120 steps, masks all but hard) has no counterpart here, so the
    # knobs of learned stay as they are.
    "dobi-svd": _preset(
        "Truncation positions learned by gradient",
        "Dobi-SVD, ICLR 2025 (arXiv 2502.02723)",
        allocator="learned",
        decomposer="whitened",
        plan={"learning_start": "uniform"},
    ),
    "best": _preset(
        "What measures best here: optimal shares, the K-FAC metric, pivoted pairs",
        "hisvd, 2026",
        allocator="waterfill",
        decomposer="fisher",
        metric="held-out",
        plan={"input_shrinkage": 0.02, "output_shrinkage": 0.1, "storage": "pivoted"},
    ),
}
