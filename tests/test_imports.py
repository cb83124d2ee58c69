"""Who may import whom, how much a room, a file and a function hold, and what is loaded late."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import hisvd_cli

PACKAGE = Path(hisvd_cli.__file__).parent
ROOMS = (
    *("utils", "linalg", "modeling", "calibration", "allocation", "compression", "finetuning"),
    *("inspection", "export", "evaluation", "pipelines", "cli", "demo", "docs"),
)
"""In the order of imports: each may import from those before it, and from itself."""
MATHS = ("linalg/", "allocation/methods/", "compression/methods/")
"""Import torch, pydantic, one another, and what :data:`_PLAIN` names."""
_PLAIN = {
    *("utils.errors", "utils.registry", "utils.prefetch"),
    *(
        "allocation.budget",
        "allocation.spectrum",
        "modeling.layers.lowrank",
        "modeling.layers.shapes",
    ),
}
_MOST_FILES = 12
_MOST_LINES = 300
_MOST_CODE_LINES = 40
"""Of a function, without its docstring, comments and blank lines."""
_MOST_IMPORTS = 15
"""Modules of the package that a module of the pipelines imports."""
_LONG_FILES = {
    "modeling/layers/transformers_plugin.py": "travels with checkpoints as one file, by that name",
}
_LONG_FUNCTIONS = {
    "cli/commands/compress.py:compress": "its signature is the command's options",
    "cli/commands/convert.py:convert": "its signature is the command's options",
    "cli/commands/plan.py:plan": "its signature is the command's options",
    "cli/options.py:_take_common": "its signature is the options of every command",
    "compression/factorize.py:compress": "a third of it is its signature",
}


def sources() -> dict[str, str]:
    """Return the Python code of the package by path."""
    paths = sorted(PACKAGE.rglob("*.py"))
    assert len(paths) > 150
    return {p.relative_to(PACKAGE).as_posix(): p.read_text(encoding="utf-8") for p in paths}


def name_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: str, code: str) -> Iterator[str]:
    """Yield the full name of what a file imports, of each name if from a package."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            beside = f"{PACKAGE.name}.{name_of(path).rpartition('.')[0]}."
            yield from (f"{beside * node.level}{node.module}.{alias.name}" for alias in node.names)


def graph() -> dict[str, set[str]]:
    """Return module → the modules of the package that it imports, anywhere in it."""
    code = sources()
    known = set(map(name_of, code)) - {"__init__"}
    found: dict[str, set[str]] = {}
    for path, text in code.items():
        own = (n.split(".", 1)[1] for n in imports(path, text) if n.startswith("hisvd_cli."))
        found[name_of(path)] = {
            name if name in known else name.rpartition(".")[0] for name in own
        } - {"", "__version__"}
        assert found[name_of(path)] <= known, path
    return found


def test_rooms_import_in_one_direction() -> None:
    rank = {room: i for i, room in enumerate(ROOMS)}
    rank |= {"__init__": len(ROOMS), "__main__": len(ROOMS)}
    for module, used in graph().items():
        for name in used:
            head, other = module.split(".")[0], name.split(".")[0]
            assert head in rank, f"{module}: no room of that name is known"
            assert rank[other] <= rank[head], f"{module} imports {name}"


def test_modules_import_in_no_circle() -> None:
    TopologicalSorter(graph()).prepare()  # raises CycleError, which names the circle


def test_pipelines_import_few_modules() -> None:
    used = {module: len(names) for module, names in graph().items()}
    pipelines = {module: n for module, n in used.items() if module.startswith("pipelines.")}
    assert len(pipelines) > 50
    many = {module: n for module, n in pipelines.items() if n > _MOST_IMPORTS}
    counts = sorted(pipelines.items(), key=lambda item: -item[1])
    assert not many, "\n".join(f"{n} {module}" for module, n in counts)


def functions(code: str) -> Iterator[tuple[str, int]]:
    """Yield each function's name and its lines of code."""
    lines = code.splitlines()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            told = node.body[0] if ast.get_docstring(node) else None
            skipped = range(told.lineno - 1, told.end_lineno or 0) if told else range(0)
            own = range(node.lineno - 1, node.end_lineno or 0)
            kept = (lines[n].strip() for n in own if n not in skipped)
            yield node.name, sum(bool(line) and not line.startswith("#") for line in kept)


def listing() -> str:
    """Return every room with its files and their lines."""
    rooms: dict[str, list[str]] = {}
    for path, code in sources().items():
        if not path.endswith("__init__.py"):
            file = f"{Path(path).stem} {len(code.splitlines())}"
            rooms.setdefault(Path(path).parent.as_posix(), []).append(file)
    return "\n".join(f"{room} ({len(f)}): {', '.join(f)}" for room, f in sorted(rooms.items()))


def test_rooms_and_files_are_small() -> None:
    code = sources()
    rooms = Counter(str(Path(path).parent) for path in code if not path.endswith("__init__.py"))
    full = [room for room, files in rooms.items() if files > _MOST_FILES]
    long = {path for path, text in code.items() if len(text.splitlines()) > _MOST_LINES}
    assert (full, long) == ([], set(_LONG_FILES)), listing()


def test_functions_are_short() -> None:
    long = {
        f"{path}:{name}": lines
        for path, text in sources().items()
        for name, lines in functions(text)
        if lines > _MOST_CODE_LINES
    }
    assert long.keys() == _LONG_FUNCTIONS.keys(), f"{long}\n{listing()}"


def test_the_maths_imports_torch_pydantic_and_itself_alone() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "pydantic"}
    seen = 0
    for path, code in sources().items():
        if not path.startswith(MATHS):
            continue
        seen += 1
        for name in imports(path, code):
            head, _, below = name.partition(".")
            if head == PACKAGE.name:
                inside = below.replace(".", "/").startswith(tuple(m.rstrip("/") for m in MATHS))
                assert inside or below.rpartition(".")[0] in _PLAIN, f"{path} imports {name}"
            else:
                numeric = {"numpy", "scipy"} if path.startswith("linalg/") else set()
                assert head in allowed | numeric, f"{path} imports {name}"
    assert seen > 25


def test_only_the_console_prints_and_nothing_imports_click() -> None:
    """Typer brings a copy of click of its own."""
    for path, code in sources().items():
        assert not any(name.split(".")[0] == "click" for name in imports(path, code)), path
        if path in {"cli/console.py", "demo/train.py"}:  # the latter is a script
            continue
        for node in ast.walk(ast.parse(code)):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called != "print", path
            assert not called.startswith(("sys.stdout", "sys.stderr")), path


def test_the_command_line_loads_no_library_before_it_needs_it() -> None:
    code = (
        "import sys, hisvd_cli.cli.app\n"
        "heavy = {'torch', 'transformers', 'datasets', 'safetensors', 'numpy', 'huggingface_hub'}\n"
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
