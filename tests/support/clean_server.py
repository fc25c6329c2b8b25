"""Clean processes for exports' checks that needn't import transformers first: forked off one that has.

Each check of an export loads it in a process that finds neither this project nor any optional package, and takes
seconds to import what is left. `CleanServer.run` is `sft.hub.reload.run_clean` without that. The server is this file as
a program: it hides what clean_load.py hides, imports, and forks for each line (a job, an environment, a file for what
is said).
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).parents[2] / "sft/hub/clean_load.py"


class CleanServer:
    """Starts when it is first asked: one server for whole models and one for adapters, whose checks find all packages.

    `cold`: the function that it stands for.
    """

    def __init__(self, cold: Callable[..., subprocess.CompletedProcess[str]]) -> None:
        self.cold = cold
        self._servers: dict[bool, subprocess.Popen[str]] = {}

    def run(self, job: Path, environment: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
        """As `sft.hub.reload.run_clean`."""
        adapters = bool(json.loads(job.read_text())["adapters"])
        if adapters not in self._servers:
            self._servers[adapters] = _started(environment, adapters)
        server = self._servers[adapters]
        assert server.stdin is not None and server.stdout is not None
        with tempfile.NamedTemporaryFile("r") as said:
            print(json.dumps([str(job), dict(environment), said.name]), file=server.stdin, flush=True)
            assert select.select([server.stdout], [], [], timeout)[0], "the clean process doesn't end"
            code = int(server.stdout.readline())  # bounded: there is something to read
            return subprocess.CompletedProcess([str(PROGRAM), str(job)], code, "", said.read())

    def stop(self) -> None:
        """End them."""
        for server in self._servers.values():
            server.kill()
            server.communicate(timeout=20)
        self._servers.clear()


def _started(environment: Mapping[str, str], adapters: bool) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", __file__, *(["adapters"] if adapters else [])]
    return subprocess.Popen(command, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _serve() -> None:
    spec = importlib.util.spec_from_file_location("clean_load", PROGRAM)
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    if len(sys.argv) == 1:
        program.hide()
    else:
        import peft  # noqa: F401

        import sft.models  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaConfig

    AutoModelForCausalLM.from_config(  # what a first model makes transformers import
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    )
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(_do(program, *json.loads(line)))
        status = os.waitpid(child, 0)[1]  # bounded: who asked for it ends this process
        print(os.waitstatus_to_exitcode(status), flush=True)


def _do(program: Any, job: str, environment: dict[str, str], said: str) -> int:
    os.dup2(os.open(said, os.O_WRONLY), 2)
    os.environ.clear()
    os.environ.update(environment)
    if len(sys.argv) == 1:  # a home of its own
        from transformers import dynamic_module_utils

        dynamic_module_utils.HF_MODULES_CACHE = f"{environment['HF_HOME']}/modules"
    sys.argv = [str(PROGRAM), job]
    try:
        program.main()
    except SystemExit as end:
        print(end.code, file=sys.stderr, flush=True)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        return 1
    return 0


if __name__ == "__main__":
    _serve()
