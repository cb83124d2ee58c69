"""Finds globals in a pickle that execute code when other tools load it."""

from __future__ import annotations

import re

from hisvd_cli.modeling.pickles.records import Global
from hisvd_cli.modeling.pickles.unpickle import Machine

_MAX_REPORTED_GLOBALS = 20
_CODE_MODULE = re.compile(
    "_?(os|posix|nt|sys|subprocess|posixsubprocess|commands|shutil|pty|socket|socketserver|asyncio"
    "|multiprocessing|thread|signal|importlib|frozen_importlib|imp|pkgutil|runpy|zipimport|site"
    "|pickle|dill|cloudpickle|joblib|marshal|shelve|ctypes|cffi|code|codeop|pdb|bdb|timeit|cProfile"
    "|profile|trace|doctest|pydoc|webbrowser|urllib|requests|http|ftplib|smtplib|pip|ensurepip|venv"
    "|distutils|setuptools|idlelib|lib2to3|gc)|__(builtins|globals|subclasses|loader)__"
)
_CODE_CALL = re.compile(
    r"builtins\.(eval|exec|execfile|compile|open|input|breakpoint|__import__|apply|getattr|setattr"
    r"|delattr|globals|locals|vars|__build_class__)(\..*)?"
    r"|_?operator\.(attrgetter|methodcaller)|types\.(FunctionType|CodeType)|numpy\.load"
    r"|pandas\.read_pickle|torch\.(serialization\.|hub\.)?load|torch\.storage\._load_from_bytes"
    r"|torch\.(ops|classes)\.load_library"
)


def _runs_code(named: Global) -> bool:
    # With protocol 4, a module can be reached through another one: "torch.hub" "os.system".
    parts = (named.module.partition(".")[0], *named.name.split("."))
    return bool(_CODE_CALL.fullmatch(named.path)) or any(map(_CODE_MODULE.fullmatch, parts))


def runners(machine: Machine) -> list[str]:
    """Return the paths of the globals that execute code, sorted."""
    return sorted({named.path for named in machine.globals.values() if _runs_code(named)})


def code_problems(machine: Machine) -> list[str]:
    """Return the problems about code execution, one line each."""
    named = runners(machine)
    problems = [
        f"uses `{path}`, which executes code when loaded by other tools; it was not executed here"
        for path in named[:_MAX_REPORTED_GLOBALS]
    ]
    if len(named) > len(problems):
        problems.append(f"uses {len(named) - len(problems)} more globals of this kind")
    if machine.altered:
        first = next(iter(machine.altered))
        problems.append(f"sets attributes of `{first}` itself; this was not executed here")
    return problems
