"""No wait, in code or test, is without a limit."""

from __future__ import annotations

from pathlib import Path

import pytest
from waits import unbounded_waits

ENDLESS = """
import fcntl, os, select, subprocess
import concurrent.futures
from subprocess import Popen
def all_of_them(command, process, thread, queue, lock, future, pipe, handle, futures):
    subprocess.run(command)
    subprocess.check_output(command, timeout=None)
    process.wait()
    process.wait(None)
    process.communicate()
    process.stdout.read()
    thread.join()
    queue.get()
    queue.get(block=True)
    future.result()
    concurrent.futures.wait(futures)
    lock.acquire()
    pipe.recv()
    fcntl.flock(handle, fcntl.LOCK_EX)
    os.waitpid(process.pid, 0)
    select.select([handle], [], [])
    urllib.request.urlopen("http://127.0.0.1")
    with Popen(command):
        pass
"""
BOUNDED = """
import fcntl, os, select, subprocess
def none_of_them(command, process, thread, queue, future, handle, words, lookup):
    subprocess.run(command, timeout=5)
    process.wait(5)
    process.communicate(timeout=5)
    process.communicate()  # bounded: it was killed
    thread.join(5)
    queue.get(timeout=5)
    future.result(timeout=0)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.waitpid(process.pid, os.WNOHANG)
    select.select([handle], [], [], 5)
    return ", ".join(words), lookup.get("key"), handle.read()
"""


@pytest.mark.parametrize("folder", ["sft", "kernels", "tests"])
def test_every_wait_has_a_limit(repo_root: Path, folder: str) -> None:
    files = sorted((repo_root / folder).rglob("*.py"))
    found = [wait for path in files for wait in unbounded_waits(path)]
    assert len(files) > 1 and found == []


def test_endless_waits_are_found(tmp_path: Path) -> None:
    source = tmp_path / "endless.py"
    source.write_text(ENDLESS)
    first = ENDLESS.splitlines().index("    subprocess.run(command)") + 1
    last = ENDLESS.splitlines().index("        pass")
    assert sorted(int(line.split(":")[1]) for line in unbounded_waits(source)) == list(range(first, last + 1))
    source.write_text(BOUNDED)
    assert unbounded_waits(source) == []
