"""Checks of one architecture: what hisvd makes of its tiny model, against other computations."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hisvd_cli as hisvd
from hisvd_cli.utils.errors import HisvdError, UnsupportedModelError
from tests.architectures.case import TOLERANCE, Case, compare, load_whole
from tests.architectures.factors import (
    dense_parameter,
    dense_weights,
    factors,
    projection_error,
    read_tensors,
)
from tests.architectures.overrides import NOT_BUILT
from tests.architectures.registry import Architecture, out_of_scope
from tests.architectures.results import Result
from tests.architectures.tiny import save

RATIO = 0.6
PROJECTION = 1e-3
_TEXT: dict[str, Any] = {"dataset": "demo", "seqlen": 32, "progress": False, "device": "cpu"}
_LONGEST = 240


def check_compress(case: Case, preset: str = "hisvd") -> None:
    """Compress with a preset."""
    settings: dict[str, Any] = {**_TEXT, "preset": preset, "ratio": RATIO, "samples": 4}
    folder = case.checkpoint
    hisvd.compress(str(case.original), output=folder, evaluate=False, **settings)


def check_budget(case: Case) -> None:
    """Count what was kept, from the tensors of both folders."""
    counts = [
        sum(t.numel() for t in read_tensors(f).values()) for f in (case.original, case.checkpoint)
    ]
    dense = sum(dense_parameter(case.whole, s["name"])[0].numel() for s in case.plan["sublayers"])
    kept = dense - (counts[0] - counts[1])
    assert kept == case.plan["kept_parameters"], (
        f"The files keep {kept} parameters, the plan says {case.plan['kept_parameters']}."
    )
    assert kept <= RATIO * dense, f"{kept} parameters are kept, of a budget of {RATIO * dense:.0f}."
    assert kept > 0.9 * RATIO * dense, f"Only {kept} of {RATIO * dense:.0f} parameters are used."


def check_load(case: Case) -> None:
    """Load the checkpoint with no missing, unexpected or mismatched key."""
    assert case.loaded is not None


def check_factors(case: Case) -> None:
    """Compare each product with the projection of the original's weight that it should be."""
    weights = dense_weights(case.whole, case.checkpoint)
    for name, (u, v) in factors(case.whole, case.checkpoint).items():
        error = projection_error(weights[name], u, v)
        assert error <= PROJECTION, f"{name} is {error:.1e} away from a projection of the weight."


def check_logits(case: Case) -> None:
    """Compare logits with those of the multiplied-out model."""
    compare(case.logits(case.loaded), case.logits(case.dense))


def check_generate(case: Case) -> None:
    """Generate five tokens with cache and without, and compare with the dense model."""
    made = {}
    for use_cache in (True, False):
        try:
            wanted = _generate(case, case.dense, use_cache)
        except Exception:  # the class itself cannot do so
            continue
        made[use_cache] = _generate(case, case.loaded, use_cache)
        assert torch.equal(made[use_cache], wanted), (
            f"With cache {use_cache}, other tokens than the dense model's are generated."
        )
    assert made, "The class generates neither with cache nor without."


def _generate(case: Case, model: PreTrainedModel, use_cache: bool) -> Tensor:
    """Return the five tokens after a prompt ``[13]``; their logits must be finite."""
    found = case.part(model).generate(
        case.tokens[:1, :8],
        attention_mask=torch.ones(1, 8, dtype=torch.long),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert not any(bool(t.isnan().any()) for t in found.logits), "Generated logits are NaN."
    tokens: Tensor = found.sequences[0]
    assert len(tokens) == 13, f"{len(tokens) - 8} tokens were generated instead of 5."
    return tokens


def check_inspect(case: Case) -> None:
    """Audit the checkpoint."""
    problems = hisvd.inspect(case.checkpoint, progress=False).problems
    assert not problems, problems[0]


def check_eval(case: Case) -> None:
    """Evaluate in memory, beside the original."""
    case.perplexity = _perplexity(case, stream="off", baseline=str(case.original))


def check_stream(case: Case) -> None:
    """Evaluate block by block: the same perplexity."""
    found = _perplexity(case, stream="on")
    assert math.isclose(found, case.perplexity, rel_tol=TOLERANCE), (
        f"The perplexity is {found} when streamed, and {case.perplexity} in memory."
    )


def _perplexity(case: Case, **settings: Any) -> float:
    found = hisvd.evaluate(case.checkpoint, windows=2, fresh=True, **_TEXT, **settings)
    assert not found.failures, found.failures[0].message
    perplexity = found.perplexity[str(case.checkpoint)]
    assert perplexity is not None, "The perplexity is not finite."
    return float(perplexity)


def check_dense(case: Case) -> None:
    """Convert to dense: names and shapes of the original's files, logits of the product."""
    folder = case.work / "dense"
    hisvd.convert(case.checkpoint, to="dense", output=folder, progress=False)
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in read_tensors(each).items()}
        for each in (case.original, folder)
    ]
    other = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
    assert not other, f"{len(other)} tensors differ in name or shape, such as {other[0]}."
    compare(case.logits(load_whole(case.each, folder)), case.logits(case.dense))


def check_best(case: Case) -> None:
    """Compress with the preset ``best``, load, and compare logits."""
    best = Case(case.each, case.original, case.work / "best")
    check_compress(best, "best")
    check_logits(best)


STEPS: dict[str, Callable[[Case], None]] = {
    "compress": check_compress,
    "load": check_load,
    "budget": check_budget,
    "factors": check_factors,
    "logits": check_logits,
    "generate": check_generate,
    "inspect": check_inspect,
    "eval": check_eval,
    "eval --stream": check_stream,
    "convert --to dense": check_dense,
    "best": check_best,
}


def covered(case: Case) -> float:
    """Return which share of the matrices in the blocks the plan may compress."""
    names = [s["name"] for s in case.plan["sublayers"]]
    blocks = {re.match(r".*?\.\d+\.", name).group() for name in names}  # type: ignore[union-attr]
    matrices = [
        parameter.numel()
        for name, parameter in case.whole.named_parameters()
        if parameter.ndim > 1 and name.startswith(tuple(blocks))
    ]
    planned: int = sum(math.prod(s["shape"]) for s in case.plan["sublayers"])
    return round(planned / sum(matrices), 2)


def run(each: Architecture, folder: Path) -> Result:
    """Build one architecture in a folder and check all of it."""
    if why := out_of_scope(each):
        return Result("out of scope", sentence=why)
    if why := NOT_BUILT.get(each.model_type):
        return Result("not built", sentence=why)
    case = Case(each, folder / "original", folder)
    try:
        built = case.logits(save(each, case.original))
    except Exception as error:
        return Result("not built", sentence=sentence_of(error, folder))
    try:
        compare(case.logits(case.whole), built)
    except Exception as error:
        why = f"transformers does not load what it saved: {sentence_of(error, folder)}"
        return Result("not built", sentence=why)
    return checked(case, folder)


def checked(case: Case, folder: Path) -> Result:
    """Run all steps on a saved model; the first that fails decides."""
    for name in STEPS:
        found = _attempt(case, name, folder)
        if found and (found.state, name) == ("refused", "best"):
            return Result("works", best=found.sentence, covered=covered(case))
        if found:
            return found
    return Result("works", covered=covered(case))


def _attempt(case: Case, name: str, folder: Path) -> Result | None:
    try:
        STEPS[name](case)
    except UnsupportedModelError as error:
        return Result("refused", name, sentence_of(error, folder))
    except Exception as error:
        return Result("fails", name, sentence_of(error, folder))
    return None


def sentence_of(error: BaseException, folder: Path) -> str:
    """Return an error in one line, without the paths of this run."""
    text = " ".join(str(error).replace(f"{folder}/", "").split())
    text = re.split(r"(?<=[.!]) (?=[A-Z])", text)[0] or repr(error)
    if not isinstance(error, AssertionError | HisvdError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
