"""What libraries warn of goes to a file; their errors, and what is ours, to the terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sft.data.engine.local import LocalEngine
from sft.utils.quiet import LOG_FILE

# A library as they are: its logger has a handler of its own, and hands nothing on.
LIBRARY = """
import logging, sys, warnings
logger = logging.getLogger("noisy_library.inner")
logging.getLogger("noisy_library").addHandler(logging.StreamHandler(sys.stderr))
logging.getLogger("noisy_library").propagate = False
def warn():
    warnings.warn("a warning of the library")
    warnings.warn("soon gone", FutureWarning)
    logger.warning("a logged warning of the library")
    logger.info("chatter")
    print("printed by it")
def fail():
    logger.error("an error of the library")
"""
SCRIPT = """
import logging, sys, warnings
from pathlib import Path
from sft.utils.quiet import quiet_libraries
quiet_libraries({folder}, debug={debug})
import noisy_library
noisy_library.warn()
noisy_library.fail()
logging.getLogger("sft.data.store").warning("a warning of ours\\x1b[2J")
logging.getLogger("another").warning("and one of another library")
import sft.data.read.row as ours
exec(compile('import warnings; warnings.warn("ours by warnings")', ours.__file__, "exec"))
"""
WARNED = ("a warning of the library", "soon gone", "a logged warning of the library", "and one of another library")
TOLD = ["an error of the library", "a warning of ours\\x1b[2J", "ours by warnings"]


def said(tmp_path: Path, folder: str, debug: bool = False) -> subprocess.CompletedProcess[str]:
    (tmp_path / "noisy_library.py").write_text(LIBRARY)
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(folder=folder, debug=debug)],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "home"), "PYTHONPATH": str(tmp_path)},
    )


@pytest.mark.parametrize("run", [True, False])
def test_warnings_of_libraries_go_to_the_file(tmp_path: Path, run: bool) -> None:
    """That of the run; without one, and while it isn't there, one of the user's."""
    if run:
        (tmp_path / "run").mkdir()
    done = said(tmp_path, f"Path({str(tmp_path / 'run')!r})")
    assert done.returncode == 0 and done.stderr.splitlines() == TOLD and done.stdout == "printed by it\n"
    log = tmp_path / "run" / LOG_FILE if run else tmp_path / "home" / ".cache" / "sambay-sft" / LOG_FILE
    text = log.read_text()
    assert all(text.count(warning) == 1 for warning in WARNED) and "chatter" not in text
    assert "noisy_library.py:7: UserWarning: a warning" in text and "noisy_library.inner: a logged" in text


def test_where_no_file_can_be_written_they_are_told(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("no folder")
    done = said(tmp_path, "None")
    assert done.returncode == 0 and all(warning in done.stderr for warning in WARNED)


def test_who_looks_for_a_fault_sees_them(tmp_path: Path) -> None:
    done = said(tmp_path, "None", debug=True)
    assert all(done.stderr.count(warning) == 1 for warning in (*WARNED, "an error of the library"))


def warn_in_a_worker(number: int) -> dict[str, str]:
    """A task whose library warns."""
    import logging
    import warnings

    warnings.warn_explicit("of a library's module", UserWarning, f"library{number}.py", 1)
    logging.getLogger("some_library").warning("by its logger")
    return {}


class Task(int):
    """A task for the engine."""

    workers = 2


def test_processes_that_prepare_data_are_as_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from sft.utils import quiet

    before, quiet._route.asked = quiet._route.asked, (tmp_path, False)
    try:
        with LocalEngine(2) as engine:
            assert len(list(engine.run(warn_in_a_worker, [Task(1), Task(2)]))) == 2
    finally:
        quiet._route.asked = before
    text = (tmp_path / LOG_FILE).read_text()
    assert text.count("of a library's module") == 2 == text.count("some_library: by its logger")
    assert "library" not in capfd.readouterr().err


def test_bars_of_transformers_are_not_shown_when_a_model_is_loaded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tiny_sambay import tiny_config

    from sft.models.load import load_checkpoint
    from sft.models.sambay.modeling_phi4flash import Phi4FlashForCausalLM

    Phi4FlashForCausalLM(tiny_config()).save_pretrained(tmp_path)
    capfd.readouterr()
    load_checkpoint(str(tmp_path), dtype="float32")
    assert "it/s" not in capfd.readouterr().err
