"""The plug-in's modules that need no vLLM, loaded from the checkout: it isn't installed where this project is."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def plugin(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """A module of the plug-in by its name: plugin("heads")."""
    monkeypatch.syspath_prepend(str(repo_root / "serve"))
    yield lambda name: importlib.import_module(f"sambay_vllm.{name}")
    for name in [name for name in sys.modules if name.split(".")[0] == "sambay_vllm"]:
        del sys.modules[name]
