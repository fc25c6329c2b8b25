"""Python processes that begin with all that is heavy imported: forked off one that has imported it.

A process that trains imports for ten seconds and works for one. It does nothing else for it; only what is read
when torch or the libraries are imported (OMP_NUM_THREADS, HF_HOME, ...) is as the tests have it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEAVY = ["sft.run.chain", "sft.train.stage", "sft.evaluate.runner", "sft.hub.export", "deepspeed", "accelerate"]

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(HEAVY)


class WarmPopen:
    """`python WORDS`, with the methods of a subprocess.Popen that tests use. Its output goes to two files."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str], stdout: Path, stderr: Path) -> None:
        self.args = list(words)
        self._process: Any = _forks.Process(target=_become, args=(self.args, dict(env), str(stdout), str(stderr)))
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As a Popen's: negative, where a signal ended it."""
        return self._process.exitcode  # type: ignore[no-any-return]

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        return self.returncode

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        if self.poll() is None:
            self._process.kill()

    def wait(self, timeout: float) -> None:
        """Until it ends; fails after `timeout` seconds."""
        self._process.join(timeout)
        assert self.returncode is not None, f"{self.args} hasn't ended in {timeout:.0f} s"


def _become(words: list[str], env: dict[str, str], stdout: str, stderr: str) -> None:
    """Go on as `python WORDS` would have begun."""
    for number, (path, flags) in enumerate([("/dev/null", os.O_RDONLY), (stdout, os.O_WRONLY), (stderr, os.O_WRONLY)]):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(env)
    gc.freeze()
    sys.path[:0] = [*env.get("PYTHONPATH", "").split(":"), str(Path(words[0]).parent)]
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        if env.get("RANK") == "0":  # whose store goes with it: others may have to read yet, and it ends at once
            time.sleep(2.0)
