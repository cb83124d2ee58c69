"""The Python API: the pipelines of the command line, with keywords for flags and objects for
files."""

from hisvd_cli.pipelines.api.artifacts import Calibration, Checkpoint
from hisvd_cli.pipelines.api.compression import compress
from hisvd_cli.pipelines.api.findings import Audit, Evaluation
from hisvd_cli.pipelines.api.loading import load
from hisvd_cli.pipelines.api.plan_result import Plan
from hisvd_cli.pipelines.api.planning import calibrate, plan
from hisvd_cli.pipelines.api.reading import convert, evaluate, inspect

__all__ = [
    "Audit",
    "Calibration",
    "Checkpoint",
    "Evaluation",
    "Plan",
    "calibrate",
    "compress",
    "convert",
    "evaluate",
    "inspect",
    "load",
    "plan",
]
