"""`sft push` and signals: a clear end in the middle of an upload, nothing half-written; the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

from sft.hub.folder import list_files

REPO = "tester/tiny"


def begin(hub: HubServer, folder: Path, tmp_path: Path) -> subprocess.Popen[str]:
    words = ["push", "tiny", "--output_dir", "run", "--folder", str(folder), "--repo_id", REPO]
    environment = {**os.environ, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "sft", *words],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("moment", "signum", "status"),
    [
        (("PUT", "/lfs/"), signal.SIGINT, 130),
        (("PUT", "/lfs/"), signal.SIGTERM, 143),
        (("POST", "/commit/"), signal.SIGTERM, 143),
        (("GET", "/resolve/"), signal.SIGINT, 130),
    ],
)
def test_a_signal_in_a_push(
    hub: HubServer, sambay_export: Path, tmp_path: Path, moment: tuple[str, str], signum: int, status: int
) -> None:
    before = {file.path: file.sha256 for file in list_files(sambay_export)}
    fault = hub.add_fault(*moment, "hang", times=1)
    child = begin(hub, sambay_export, tmp_path)
    try:
        assert fault.hit.wait(60), child.communicate(timeout=5)
        child.send_signal(signum)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
        fault.released.set()
    assert child.returncode == status, err
    told = [line for line in err.splitlines() if line.startswith("sft:")]
    assert told == ["sft: interrupted; the same command continues it"] and "Traceback" not in err + out, err
    # The repository has all of it or nothing, and the folder, beside which a copy is downloaded, is as it was.
    assert set(hub.files(REPO)) in ({".gitattributes"}, {".gitattributes", *before})
    assert {file.path: file.sha256 for file in list_files(sambay_export)} == before
    assert [path for path in sambay_export.parent.iterdir() if path != sambay_export] == []
    again = begin(hub, sambay_export, tmp_path)
    try:
        out, err = again.communicate(timeout=120)
    finally:
        again.kill()
    assert again.returncode == 0 and "reloaded and equal" in out, err
    assert set(hub.files(REPO)) == {".gitattributes", *before}
