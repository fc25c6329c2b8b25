"""`make wheelhouse`: what an image lacks, and nothing that it has; what that wants in its turn."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

# Package -> version and what it wants.
INDEX = {
    "a": ("2.0", ['b>=1; extra == "fast"', "c", 'old; python_version < "3.12"', 'new; python_version >= "3.12"']),
    "b": ("1.5", ["c>=3"]),
    "c": ("3.1", []),
    "new": ("0.1", ["a"]),
    "torch": ("2.13.0", ["c"]),
}


@pytest.fixture(scope="module")
def tool(repo_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("wheelhouse", repo_root / "tools/wheelhouse.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gathered(tool, tmp_path):
    """The names that are gathered for requirements, given what the image has."""

    def fetch(requirement: Requirement) -> Path:
        version, wanted = INDEX[requirement.name]
        path = tmp_path / f"{requirement.name}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            lines = [f"Name: {requirement.name}", f"Version: {version}", *(f"Requires-Dist: {one}" for one in wanted)]
            archive.writestr(f"{requirement.name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n\n")
        return path

    def of(*wanted: str, have: str = "", pinned: dict[str, str] | None = None) -> list[str]:
        lines = [Requirement(line) for line in wanted]
        wheels = tool.gather(lines, tool.read_have(have), pinned or {}, tool.environment("3.12"), fetch)
        return [wheel.name.partition("-")[0] for wheel in wheels]

    return of


def test_what_is_wanted_and_what_that_wants(gathered):
    assert gathered("a") == ["a", "c", "new"]
    assert gathered("a[fast]") == ["a", "b", "c", "new"]
    # An extra that is wanted later of a package that is there.
    assert gathered("a", "a[fast]") == ["a", "b", "c", "new"]


def test_what_the_image_has_is_left_out_with_all_behind_it(gathered):
    have = "torch==2.11.0a0+nv26.3\n# a comment\n-e /somewhere\nC==3.5\nnew @ file:///wheels/new.whl\n"
    assert gathered("torch>=2.11", "a", have=have) == ["a", "torch"]  # a version before 2.11 is none
    assert gathered("torch>=2.11", "a", have=have.replace("a0+nv26.3", "+cu128")) == ["a"]


def test_what_does_not_suit_is_told_and_taken_along(gathered, capsys):
    assert gathered("b", have="c==2.0") == ["b", "c"]
    assert "the image's c 2.0 doesn't suit b (c>=3): it is replaced" in capsys.readouterr().out


def test_versions_that_contradict_are_refused(gathered, tool):
    with pytest.raises(ValueError, match=r"a 2.0 doesn't suit this project, which wants a<2"):
        gathered("a<2", pinned={"a": "2.0"})
    with pytest.raises(ValueError, match="is no line of `pip freeze`"):
        tool.read_have("three words here")


def test_all_that_the_project_wants_has_a_version(tool):
    """But for what torch's builds choose, and what a GPU alone needs."""
    pinned = tool.pins()
    lacking = [one.name for one in tool.project({"serve", "teacher"}) if tool.canonicalize_name(one.name) not in pinned]
    assert lacking == []
