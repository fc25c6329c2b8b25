"""The built wheel carries the recipes, and works from there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy of what it is built from."""
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "build")
    for name in ("sft", "kernels", "configs", "data_recipes"):
        shutil.copytree(repo_root / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo_root / name, source)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (found,) = out.glob("*.whl")
    return found


def test_wheel_carries_the_recipes_and_all_code(wheel: Path, repo_root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder in ("configs", "data_recipes"):
        files = [path for path in (repo_root / folder).rglob("*") if path.is_file() and path.name != ".gitkeep"]
        assert files
        for path in files:
            assert f"sft/{path.relative_to(repo_root).as_posix()}" in names
    for package in (repo_root / "sft", repo_root / "kernels" / "sambay_kernels"):
        for path in package.rglob("*"):
            if path.is_file() and path.suffix not in (".pyc", ".so") and "build" not in path.parts:
                assert path.relative_to(package.parent).as_posix() in names
    assert not any(name.startswith(("tests/", "kernels/", "configs/")) for name in names)


def test_installed_copy_lists_and_hands_out_recipes(wheel: Path, tmp_path: Path, repo_root: Path) -> None:
    target = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def sft(*words: str) -> str:
        command = [sys.executable, "-m", "sft", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, env=environment, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = sft("recipes")
    for path in (repo_root / "configs").glob("*/recipe.yaml"):
        assert path.parent.name in listed
    for path in (repo_root / "data_recipes").glob("*.yaml"):
        assert path.stem in listed
    sft("recipes", "copy", "phi4-mini-flash", "my.yaml")
    assert sft("run", "--config", "my.yaml", "--dry_run") == "runs/phi4-mini-flash/resolved.yaml\n"
    where = "import sft.recipe.packaged as p; print(p.folder('configs'), p.find_deepspeed('zero2'))"
    command = [sys.executable, "-c", where]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=elsewhere, env=environment, check=True, timeout=120
    )
    assert done.stdout.count(str(target / "sft" / "configs")) == 2


def test_wheel_names_its_command_and_extras(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        entry_points = next(name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        text = archive.read(metadata).decode()
        assert "sft = sft.cli.main:main" in archive.read(entry_points).decode()
    for extra in ("cuda", "dev"):
        assert f"Provides-Extra: {extra}" in text
