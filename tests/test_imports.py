"""Who may import whom, and what stays unloaded until it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hisvd_cli

PACKAGE = Path(hisvd_cli.__file__).parent
MATHS = [
    *("budget.py", "spectrum.py", "moments.py", "statistics.py", "metric.py", "held_out.py"),
    *(
        "lowrank.py",
        "registry.py",
        "hull.py",
        "pivot.py",
        "eigen.py",
        "precision.py",
        "truncation.py",
    ),
    *("ahead.py", "blas.py", "products.py", "subspace.py", "tridiagonal.py"),
    *("corrections.py", "updates.py", "quantized.py", "rounding.py"),
    *("intervals.py", "divergence.py"),
    *("byte_budget.py", "byte_frontier.py", "rounding_noise.py"),
    *(f"allocate/{path.name}" for path in sorted((PACKAGE / "allocate").glob("*.py"))),
    *(f"decompose/{path.name}" for path in sorted((PACKAGE / "decompose").glob("*.py"))),
]
INTERFACE = (
    "commands",
    "app",
    "options",
    "profile",
    "profile_search",
    "settings",
    "presets",
    "console",
    "streams",
    "views",
    "plan_views",
    "byte_views",
    "profile_views",
    "charts",
    "evaluation_views",
    "efficiency_views",
)


def modules() -> list[str]:
    return [str(path.relative_to(PACKAGE)) for path in sorted(PACKAGE.rglob("*.py"))]


def imports(module: str) -> Iterator[str]:
    """Yield the full name of each module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A file that travels with checkpoints names its neighbours relatively.
            yield f"{PACKAGE.name}.{node.module}" if node.level else str(node.module)


def own(name: str) -> str | None:
    """Return the part of a name below the package: ``allocate.hisvd``."""
    head, _, rest = name.partition(".")
    return rest if head == PACKAGE.name else None


def test_the_maths_is_all_there() -> None:
    assert all((PACKAGE / module).is_file() for module in MATHS)
    assert len(MATHS) > 8


@pytest.mark.parametrize("module", MATHS)
def test_maths_imports_torch_and_itself_alone(module: str) -> None:
    maths = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in MATHS}
    for name in imports(module):
        below = own(name)
        if below is None:
            known = {
                *sys.stdlib_module_names,
                "torch",
                *(["numpy", "scipy"] if module in {"blas.py", "tridiagonal.py"} else []),
            }
            assert name.split(".")[0] in known, name
        else:
            assert below in {*maths, "errors"}, name


@pytest.mark.parametrize("module", modules())
def test_only_the_interface_knows_the_interface(module: str) -> None:
    """The builders take settings apart; nothing below them sees a profile or a terminal."""
    if module.split("/")[0].removesuffix(".py") in {*INTERFACE, "__main__", "completions"}:
        return
    allowed = {"profile", "settings"} if module.startswith("build/") else set[str]()
    known = {(own(name) or "").split(".")[0] for name in imports(module)}
    assert known & set(INTERFACE) <= allowed
    if not module.startswith("build/"):
        assert "build" not in known


@pytest.mark.parametrize("module", modules())
def test_only_the_console_prints(module: str) -> None:
    if module in {"console.py", "demo/train.py"}:  # the latter is a script that nothing imports
        return
    for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called != "print"
            assert not called.startswith(("sys.stdout", "sys.stderr"))


@pytest.mark.parametrize("module", modules())
def test_click_is_not_imported(module: str) -> None:
    """Typer brings a copy of its own."""
    assert not any(name.split(".")[0] == "click" for name in imports(module))


def test_the_command_line_loads_no_library_before_it_needs_it() -> None:
    code = (
        "import sys, hisvd_cli.app\n"
        "heavy = {'torch', 'transformers', 'datasets', 'safetensors', 'numpy', 'huggingface_hub'}\n"
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
