"""Writes shell completion scripts: ``python -m hisvd_cli.cli.completions completions/``.

The scripts come from Typer. They call ``hisvd`` for completions, which thus match the installed
version.
"""

from __future__ import annotations

import sys
from pathlib import Path

from typer.testing import CliRunner

from hisvd_cli.cli.app import app

FILES = {"bash": "hisvd.bash", "zsh": "_hisvd", "fish": "hisvd.fish"}
"""File name by shell, as each shell expects it."""

_ZSH_REGISTER = "compdef _hisvd_completion hisvd"
_ZSH_START = f"""\
if [[ $zsh_eval_context[-1] == (shfunc|loadautofunc) ]]; then
  _hisvd_completion "$@"  # found in $fpath, and called for the first word to complete
else
  {_ZSH_REGISTER}
fi"""


def script(shell: str) -> str:
    """Return the completion script for ``bash``, ``zsh`` or ``fish``."""
    environment = {"_HISVD_COMPLETE": f"source_{shell}"}
    text = CliRunner().invoke(app, prog_name="hisvd", env=environment).stdout.strip()
    # On its first call from $fpath, Typer's zsh script registers itself without completing.
    return text.replace(_ZSH_REGISTER, _ZSH_START) + "\n"


def write_scripts(folder: Path) -> None:
    """Write the scripts for all shells to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for shell, name in FILES.items():
        (folder / name).write_text(script(shell), encoding="utf-8")


if __name__ == "__main__":
    write_scripts(Path(sys.argv[1]))
