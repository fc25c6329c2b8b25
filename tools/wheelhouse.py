"""Gather the wheels that an image without internet lacks: `make wheelhouse PYTHON=3.12 HAVE=freeze-of-the-image.txt`.

Walks from this project's requirements to those of their wheels. What the image has (`pip freeze` there) and what suits
is left out with all that stands behind it; the rest comes in the versions of constraints.txt, as wheels for the image's
Python and this machine's kind of processor. What is published without a wheel (DeepSpeed) is built here.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from email.parser import Parser
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parents[1]
NAME = "sambay-sft"
LIMIT = 1800
"""Seconds that pip may take for one package."""
GLIBC = range(5, 36)
"""manylinux_2_<this>: of the systems that wheels are built for, and that an image has."""

Fetch = Callable[[Requirement], Path]


def main() -> int:
    """Fill the folder, and tell what is in it, how large it is, and how it is installed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", default="3.12", help="the image's Python, such as 3.12")
    parser.add_argument("--have", type=Path, help="what the image has: the lines of `pip freeze`")
    parser.add_argument("--extras", default="", help="extras of this project, such as cuda,serve")
    parser.add_argument("--out", type=Path, default=Path("wheelhouse"))
    options = parser.parse_args()
    if not re.fullmatch(r"3\.\d+", options.python):
        parser.error(f"--python {options.python}: a version such as 3.12 is meant")
    extras = {word for word in options.extras.split(",") if word}
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        have = read_have(options.have.read_text(encoding="utf-8")) if options.have else {}
        pip = Pip(options.python, options.out)
        wheels = gather(project(extras), have, pins(), environment(options.python), pip.fetch)
        wheels.append(pip.build(str(ROOT), NAME))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"wheelhouse: {error}", file=sys.stderr)
        return 1
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{options.out}: {len(wheels)} wheels, {size / 1e6:,.1f} MB")
    wanted = f"{NAME}[{','.join(sorted(extras))}]" if extras else NAME
    print(f"there: python{options.python} -m pip install --no-index --find-links {options.out.name} '{wanted}'")
    return 0


def project(extras: set[str]) -> list[Requirement]:
    """This project's requirements."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = table["optional-dependencies"]
    if unknown := sorted(extras - optional.keys()):
        raise ValueError(f"no extra {unknown[0]!r}: there are {', '.join(optional)}")
    lines = [*table["dependencies"], *(line for extra in sorted(extras) for line in optional[extra])]
    return [Requirement(line) for line in lines]


def pins() -> dict[str, str]:
    """The versions of constraints.txt."""
    return {
        name: str(version) for name, version in read_have((ROOT / "constraints.txt").read_text()).items() if version
    }


def read_have(text: str) -> dict[str, Version | None]:
    """Package -> version, of `pip freeze`; None where it names a place in a version's stead."""
    found: dict[str, Version | None] = {}
    for line in text.splitlines():
        line = line.partition(" #")[0].strip()
        if not line or line.startswith(("#", "-")):
            continue
        try:
            requirement = Requirement(line)
            versions = [Version(spec.version) for spec in requirement.specifier if spec.operator in ("==", "===")]
        except (InvalidRequirement, InvalidVersion) as error:
            raise ValueError(f"{line!r} is no line of `pip freeze`: {error}") from error
        found[canonicalize_name(requirement.name)] = versions[0] if versions else None
    return found


def environment(python: str) -> dict[str, str]:
    """What markers are asked of: this machine, with the image's Python."""
    return {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}  # type: ignore[dict-item]


def gather(
    wanted: Iterable[Requirement],
    have: dict[str, Version | None],
    pinned: dict[str, str],
    asked: dict[str, str],
    fetch: Fetch,
) -> list[Path]:
    """The wheels of all that is wanted and isn't there, and of what they want. Tells what in the image doesn't suit."""
    queue = [(requirement, "this project") for requirement in wanted]
    wheels: dict[str, Path] = {}
    seen: dict[str, set[str]] = {}
    while queue:
        requirement, by = queue.pop(0)
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not _applies(requirement, asked):
            continue
        if name not in wheels and name in have and _suits(requirement, have[name]):
            continue
        if name not in wheels:
            if name in have:
                print(f"the image's {name} {have[name]} doesn't suit {by} ({requirement}): it is replaced")
            exact = f"{requirement.name}=={pinned[name]}" if name in pinned else str(requirement).partition(";")[0]
            wheels[name] = fetch(Requirement(exact))
        version = parse_wheel_filename(wheels[name].name)[1]
        if not requirement.specifier.contains(version, prereleases=True):
            raise ValueError(f"{name} {version} doesn't suit {by}, which wants {requirement}")
        extras = {"", *requirement.extras} - seen.setdefault(name, set())
        seen[name] |= extras
        queue += [(one, name) for one in _wanted_by(wheels[name], extras, asked)]
    return [wheels[name] for name in sorted(wheels)]


def _applies(requirement: Requirement, asked: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({**asked, "extra": ""})


def _suits(requirement: Requirement, version: Version | None) -> bool:
    return version is None or requirement.specifier.contains(version, prereleases=True)


def _wanted_by(wheel: Path, extras: set[str], asked: dict[str, str]) -> Iterator[Requirement]:
    """What a wheel requires for these extras of it; the empty one is itself."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        metadata = Parser().parsestr(archive.read(name).decode(), headersonly=True)
    for line in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        if requirement.marker is None:
            if "" in extras:
                yield requirement
        elif any(requirement.marker.evaluate({**asked, "extra": extra}) for extra in extras):
            requirement.marker = None
            yield requirement


class Pip:
    """pip, for another Python than this one."""

    def __init__(self, python: str, out: Path) -> None:
        self._python, self._out, machine = python, out, platform.machine()
        self._platforms = [f"manylinux_2_{minor}_{machine}" for minor in reversed(GLIBC)]
        self._platforms += [f"{name}_{machine}" for name in ("manylinux2014", "manylinux2010", "manylinux1", "linux")]

    def fetch(self, requirement: Requirement) -> Path:
        """The wheel of a requirement: downloaded, or built where none is published for that Python."""
        print(f"  {requirement}", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            words = ["download", "--only-binary=:all:", "--python-version", self._python, "--dest", scratch]
            words += [word for name in self._platforms for word in ("--platform", name)]
            if self._run([*words, str(requirement)]).returncode:
                return self.build(str(requirement), requirement.name)
            return self._keep(scratch, requirement.name)

    def build(self, what: str, name: str) -> Path:
        """The wheel of a source. Raises ValueError where it would fit this Python alone, and the image has another."""
        with tempfile.TemporaryDirectory() as scratch:
            done = self._run(["wheel", "--wheel-dir", scratch, what])
            if done.returncode:
                told = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no reason"]
                raise ValueError(f"{what}: no wheel for Python {self._python}, and none can be built: {told[-1]}")
            return self._keep(scratch, name)

    def _keep(self, scratch: str, name: str) -> Path:
        (wheel,) = Path(scratch).glob("*.whl")
        version = tuple(int(part) for part in self._python.split("."))
        tags = {*cpython_tags(version, platforms=self._platforms)}
        tags |= {*compatible_tags(version, f"cp{version[0]}{version[1]}", self._platforms)}
        if not tags & parse_wheel_filename(wheel.name)[3]:
            raise ValueError(f"{name}: {wheel.name} was built here and doesn't fit Python {self._python}")
        return Path(shutil.move(wheel, self._out / wheel.name))

    def _run(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pip", words[0], "--quiet", "--no-deps", *words[1:]]
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)


if __name__ == "__main__":
    sys.exit(main())
