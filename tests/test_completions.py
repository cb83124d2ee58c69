"""The completion scripts: fresh, valid, and of use."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from hisvd_cli.cli.completions import FILES, script, write_scripts
from tests.cli_helpers import SCRIPT, environment

FOLDER = Path(__file__).parent.parent / "completions"


def run(shell: str, code: str) -> list[str]:
    """Run code in a shell that finds the installed script; return the lines it prints."""
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"{shell} is not installed")
    search = {"PATH": f"{Path(SCRIPT).parent}:/usr/local/bin:/usr/bin:/bin"}
    done = subprocess.run(
        [path, "-c", code],
        env=environment(search),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize("shell", FILES)
def test_scripts_are_fresh(shell: str) -> None:
    made = (FOLDER / FILES[shell]).read_text(encoding="utf-8")
    assert made == script(shell), "run: python -m hisvd_cli.cli.completions completions/"


def test_scripts_are_written(tmp_path: Path) -> None:
    write_scripts(tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(FILES.values())


def test_zsh_finds_its_script_by_the_first_line() -> None:
    assert (FOLDER / "_hisvd").read_text(encoding="utf-8").splitlines()[0] == "#compdef hisvd"


@pytest.mark.parametrize(("shell", "check"), [("bash", "-n"), ("zsh", "-n"), ("fish", "-n")])
def test_scripts_are_valid(shell: str, check: str) -> None:
    assert run(shell, f"{shell} {check} '{FOLDER / FILES[shell]}'") == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("hisvd", "pl"), ["plan"]),
        (("hisvd", "plan", "--rat"), ["--ratio", "--ratio-of"]),
        (("hisvd", "plan", "--rank-method", "s"), ["stable"]),
        (("hisvd", "convert", "--to", ""), ["hf", "pt", "dense"]),
        (("hisvd", "plan", "--model", "x"), []),
    ],
)
def test_bash_completes(words: tuple[str, ...], expected: list[str]) -> None:
    line = " ".join(f"'{word}'" for word in words)
    code = f"""
        source '{FOLDER / "hisvd.bash"}'
        COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}
        _hisvd_completion hisvd
        for reply in "${{COMPREPLY[@]}}"; do echo "$reply"; done
    """
    assert run("bash", code) == expected


def test_fish_completes() -> None:
    code = f"source '{FOLDER / 'hisvd.fish'}'; complete -C 'hisvd plan --rat'"
    assert [line.split("\t")[0] for line in run("fish", code)] == ["--ratio", "--ratio-of"]


def test_zsh_completes_at_the_first_key(tmp_path: Path) -> None:
    """Type into an interactive zsh that has the script in its search path."""
    code = f"""
        zmodload zsh/zpty
        cd '{tmp_path}'
        zpty -b typed zsh -f -i
        zpty -w typed "PS1=; fpath=('{FOLDER}' $fpath); autoload -Uz compinit; compinit -u -D"
        zpty -w typed 'echo re''ady'
        until [[ $out == *ready* ]]; do zpty -r typed line; out+=$line; done
        zpty -n -w typed $'hisvd plan --rank-meth\\t'
        for i in {{1..100}}; do
          [[ $seen == *--rank-method* ]] && break
          sleep 0.1
          while zpty -r -t typed line; do seen+=$line; done
        done
        print -r -- $seen
        zpty -d typed
    """
    assert "--rank-method" in "".join(run("zsh", code))
