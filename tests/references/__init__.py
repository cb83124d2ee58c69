"""Independent, straightforward implementations of the published methods, to test presets against.

Each takes a :class:`~tests.references.common.Study` (a whole model in float32 and its calibration
windows) and a keep ratio, and returns the truncated dense weights U V of the sublayers that are
not left dense: the same function as the pair. They follow the papers, and for what papers leave
open the authors' programs; the allocators and decomposers of ``hisvd_cli`` were not read for them.
``python -m tests.references`` prints their perplexities on the demo model.

For all: rank r of ``[m, n]`` costs r(m+n) (``best``: r(m+n−r) + m, pivoted), every ``nn.Linear``
of the decoder blocks counts, only the one-shot allocation and decomposition are done (no
fine-tuning, no second pass, no quantised store), the loss is cross-entropy summed over the tokens
of a window.

=============  =====================================  ============================================
reference      source                                 what had to be assumed
=============  =====================================  ============================================
``svd_llm``    arXiv 2403.07378, Algorithm 1          nothing
``svd_llm_v2`` arXiv 2503.12340, Algorithm 1          the paper's ratio is what is removed; loss
                                                      summed over tokens, not averaged: a log is
                                                      not free of scale
``rsvd_llm``   SVD-LLM + Halko et al. 2011            Algorithm 4.4, 10 oversamples, 2 iterations;
                                                      seeds differ by ± 1.5 % at keep 0.6
``asvd``       arXiv 2312.05821 and its program       measured on 4 windows; the search ends on the
                                                      last point that meets the ratio
``fwsvd``      arXiv 2207.00112                       uniform ranks; one sample is one window
``gfwsvd``     arXiv 2505.17974                       uniform ranks; one sample is one window; only
                                                      the first power step, from the identity, as
                                                      hisvd takes it: not the paper's end
``zs_svd``     arXiv 2602.02848 and its program       at least rank 1; gradient a mean of windows'
``lems``       ICML 2026 and its program              the depth factor its search starts from; KL
                                                      without temperature and on all tokens; no
                                                      clipping of gradients; any rank; L_Hᵀ, not L_H
``swift_svd``  arXiv 2604.01609 and its program       effective rank for compressibility (program:
                                                      log(1 + ‖W S‖)); angles of all tokens
``dobi_svd``   arXiv 2502.02723 and its program       schedule, loss and budget: see its docstring
``hisvd``      ACL 2026; design.md, section 3         the formula of stage 2 is the project's
``best``       the issue that asks for it             solved exactly instead of by a multiplier
=============  =====================================  ============================================
"""

from __future__ import annotations

from collections.abc import Callable

from tests.references.asvd import asvd
from tests.references.common import Study, Weights
from tests.references.dobi_svd import dobi_svd
from tests.references.fisher_svd import fwsvd, gfwsvd
from tests.references.hisvd import hisvd
from tests.references.kfac import best, lems
from tests.references.svd_llm import rsvd_llm, svd_llm, svd_llm_v2
from tests.references.swift_svd import swift_svd
from tests.references.zs_svd import zs_svd

REFERENCES: dict[str, Callable[[Study, float], Weights]] = {
    "hisvd": hisvd,
    "svd-llm": svd_llm,
    "svd-llm-v2": svd_llm_v2,
    "rsvd-llm": rsvd_llm,
    "asvd": asvd,
    "fwsvd": fwsvd,
    "gfwsvd": gfwsvd,
    "zs-svd": zs_svd,
    "lems": lems,
    "swift-svd": swift_svd,
    "dobi-svd": dobi_svd,
    "best": best,
}
"""Preset → its reference."""
