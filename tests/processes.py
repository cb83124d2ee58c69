"""Commands in processes of their own, forked from one that has imported the libraries already.

Importing torch and transformers takes seconds, which a hundred tests would each pay again. What a
test of a fresh interpreter needs (the entry point, encodings, closed streams) starts a new one.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.preload"])


class Command:
    """``hisvd`` in a process of its own, or other code; of ``subprocess.Popen`` what tests need."""

    def __init__(
        self, words: Sequence[object], cwd: Path, env: Mapping[str, str], code: str = ""
    ) -> None:
        self._streams = tempfile.TemporaryDirectory(prefix="hisvd-streams-")
        self._files = [Path(self._streams.name, name) for name in ("stdout", "stderr")]
        texts = [str(word) for word in words]
        self._process = _FORKS.Process(target=_run, args=(texts, cwd, dict(env), self._files, code))
        self._process.start()

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal, None while it runs."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        """What :meth:`poll` returns."""
        return self.poll()

    def wait(self, timeout: float = 300) -> int | None:
        """Wait for the end; return the exit status."""
        self._process.join(timeout)
        return self.poll()

    def send_signal(self, sig: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end; return what stdout and stderr hold. Raises TimeoutExpired."""
        if self.wait(timeout) is None:
            raise subprocess.TimeoutExpired("hisvd", timeout)
        stdout, stderr = (p.read_text("utf-8") if p.exists() else "" for p in self._files)
        return stdout, stderr


def _run(words: list[str], cwd: Path, env: dict[str, str], files: list[Path], code: str) -> None:
    """Be the process of a command."""
    from hisvd_cli.cli.app import main

    for stream, path in zip((sys.stdout, sys.stderr), files, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    # A test run in the background ignores the signal, and its children would as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["hisvd", *words]
    try:
        exec(code, {}) if code else main()
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()
