"""Runs the tests of model, kernels and trainer on the oldest and the newest packages that pyproject.toml allows.

    python tests/versions.py [oldest] [newest] [pinned] [--fresh]

Each environment is a virtual one of its own in .versions/, kept for the next run while what it is made of stays the
same. `oldest` has every package at its lower bound, with Python 3.12 where there is one, as GPU images have it;
`newest` has what pip picks by itself, with the newest Python; `pinned` has constraints.txt, for every other Python.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
EXTRAS = ("serve", "teacher", "trackers")
TESTS: tuple[str, ...] = ("tests/unit/models", "tests/unit/generate", "tests/unit/train", "tests/kernels")
TESTS += ("tests/unit/serve", "tests/integration/test_trackers.py")
TESTS += ("tests/unit/hub/test_export.py", "tests/unit/hub/test_round_trip.py")
SHOWN = ("torch", "triton", "transformers", "trl", "peft", "datasets", "accelerate", "huggingface-hub", "deepspeed")
TOOLS = ("pytest", "hypothesis")
INSTALL_MINUTES, TEST_MINUTES = 30, 60


@dataclass(frozen=True)
class Environment:
    """One set of packages under one Python."""

    kind: str
    python: str
    requirements: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return ROOT / ".versions" / f"{self.kind}-{self.python}"

    @property
    def stamp(self) -> str:
        """What it is made of, as a hash."""
        made_of = (*self.requirements, (ROOT / "pyproject.toml").read_text(), (ROOT / "constraints.txt").read_text())
        return hashlib.sha256("\n".join(made_of).encode()).hexdigest()


def lower_bounds(pyproject: Path) -> list[str]:
    """Every dependency at exactly the version its `>=` names, EXTRAS and Triton of the `dev` extra included.

    Raises ValueError for a dependency without such a bound.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    extra = [line for line in extras["dev"] if line.startswith("triton")] + [
        line for name in EXTRAS for line in extras[name]
    ]
    bounds = []
    for line in [*project["dependencies"], *extra]:
        found = re.fullmatch(r"([\w.\[\],-]+)>=([\w.]+)(\s*;.*)?", line)
        if found is None:
            raise ValueError(f"{line!r} in pyproject.toml has no lower bound to test (name>=version)")
        bounds.append(f"{found[1]}=={found[2]}{found[3] or ''}")
    return bounds


def interpreters() -> dict[str, str]:
    """The Pythons of PYTHONS that are installed, by version."""
    homes = [Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"]
    found = {}
    for version in PYTHONS:
        candidates = [shutil.which(f"python{version}")]
        candidates += [str(path) for home in homes for path in sorted(home.glob(f"{version}*/bin/python{version}"))]
        for path in filter(None, candidates):
            # A pyenv shim is there whether or not its version is.
            if subprocess.run([path, "-c", ""], capture_output=True, timeout=60, check=False).returncode == 0:
                found[version] = path
                break
    return found


def environments(pythons: dict[str, str]) -> list[Environment]:
    """Which environments there are to be, given the Pythons."""
    newest = max(pythons, key=PYTHONS.index)
    oldest = "3.12" if "3.12" in pythons else min(pythons, key=PYTHONS.index)
    found = [
        Environment("oldest", oldest, tuple(lower_bounds(ROOT / "pyproject.toml"))),
        Environment("newest", newest, (f"{ROOT}[{','.join(EXTRAS)}]",)),
    ]
    pinned = ("-c", str(ROOT / "constraints.txt"), f"{ROOT}[dev]")
    return found + [Environment("pinned", version, pinned) for version in pythons if version not in (oldest, newest)]


def build(environment: Environment, python: str, *, fresh: bool) -> None:
    """Make the environment unless it is there; raises subprocess.CalledProcessError with pip's words."""
    folder, stamp = environment.folder, environment.folder / "made-of"
    if not fresh and stamp.is_file() and stamp.read_text() == environment.stamp:
        return
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python, "-m", "venv", str(folder)], check=True, timeout=120)
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for packages in ([*environment.requirements, *TOOLS], ["-e", str(ROOT)]):
        subprocess.run([*pip, *packages], check=True, timeout=60 * INSTALL_MINUTES, cwd=folder)
    stamp.write_text(environment.stamp)


def versions(environment: Environment) -> list[str]:
    """What is installed of SHOWN."""
    code = (
        "import importlib.metadata as m\n"
        f"for name in {SHOWN!r}:\n"
        "    try: print(m.version(name))\n"
        "    except m.PackageNotFoundError: print('-')"
    )
    command = [str(environment.folder / "bin/python"), "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split()


def run_tests(environment: Environment, arguments: list[str]) -> tuple[str, bool]:
    """What became of the tests, and whether all is well."""
    report = environment.folder / "report.xml"
    report.unlink(missing_ok=True)
    command = [str(environment.folder / "bin/python"), "-m", "pytest", "-m", "not gpu and not slow"]
    command += ["-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}", *TESTS, *arguments]
    settings = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    try:
        done = subprocess.run(command, cwd=ROOT, env=settings, timeout=60 * TEST_MINUTES, check=False)
    except subprocess.TimeoutExpired:
        return f"not done after {TEST_MINUTES} minutes", False
    if not report.is_file():
        return f"pytest ended with {done.returncode} and no report", False
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    bad = counts["failures"] + counts["errors"]
    passed = counts["tests"] - bad - counts["skipped"]
    return f"{passed} passed, {bad} failed, {counts['skipped']} skipped", done.returncode == 0 and passed > 0


def table(rows: list[list[str]]) -> str:
    """Columns under SHOWN's names."""
    lines = [["packages", "Python", *SHOWN, "tests", "minutes"], *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _kind(name: str) -> str:
    # Not by `choices`: argparse of Python 3.11 refuses the empty list that no argument means.
    if name not in ("oldest", "newest", "pinned"):
        raise argparse.ArgumentTypeError(f"{name!r} is none of oldest, newest and pinned")
    return name


def main() -> int:
    """Build, test, and print a table; 1 when anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", type=_kind, help="which of oldest, newest and pinned (default: all)")
    parser.add_argument("--fresh", action="store_true", help="make the environments anew")
    asked, pytest_arguments = parser.parse_known_args()
    pythons = interpreters()
    if not pythons:
        parser.error(f"none of Python {', '.join(PYTHONS)} is installed")
    rows, all_well = [], True
    for environment in environments(pythons):
        if asked.kinds and environment.kind not in asked.kinds:
            continue
        print(f"== {environment.kind} packages, Python {environment.python}", flush=True)
        started = time.monotonic()
        try:
            build(environment, pythons[environment.python], fresh=asked.fresh)
            found, (result, well) = versions(environment), run_tests(environment, pytest_arguments)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            found, result, well = ["-"] * len(SHOWN), f"not installed: {error}", False
        minutes = f"{(time.monotonic() - started) / 60:.1f}"
        rows.append([environment.kind, environment.python, *found, result, minutes])
        all_well = all_well and well
    print(table(rows))
    missing = [version for version in PYTHONS if version not in pythons]
    if missing:
        print(f"not installed here, so not tested: Python {', '.join(missing)}", file=sys.stderr)
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
