"""Folders that can't be written to: the remedy is named, before anything is loaded or made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chat_models import FAMILIES, write_chats, write_model

from sft.cli.main import main
from sft.utils.files import unwritable
from sft.utils.hub_cache import remedy


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_chats(tmp_path / "data.jsonl", 12)


@pytest.fixture
def closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub below a file: nobody can write there, not even root."""
    from huggingface_hub import constants

    (tmp_path / "file").write_text("")
    home = tmp_path / "file" / "hf"
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return home


@pytest.mark.parametrize("flag", [[], ["--dry_run"]])
def test_a_model_that_would_have_to_be_fetched(flag: list[str], data: Path, closed: Path, tmp_path: Path, capsys: Any):
    words = ["--variables.data", str(data), "--variables.model", "some-name/some-model"]
    assert main(["run", "lora-chat", *words, "--output_dir", str(tmp_path / "run"), *flag]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        f"model.model_name_or_path: the model some-name/some-model isn't in the cache, and {closed}/hub can't be "
        f"written to ({tmp_path}/file is no folder): set HF_HOME to a folder that can be written to"
    )
    assert not (tmp_path / "run").exists()


def test_a_data_set_that_would_have_to_be_fetched(closed: Path, tmp_path: Path, capsys: Any) -> None:
    model = write_model(tmp_path / "model", FAMILIES[1])
    words = [
        "--variables.data",
        "some-name/some-rows",
        "--variables.model",
        str(model),
        "--model.chat_template",
        "chatml",
    ]
    capsys.readouterr()
    assert main(["prepare", "lora-chat", *words, "--output_dir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "data.sources[0].path: the data set some-name/some-rows isn't in the cache, and" in line
    assert line.endswith("set HF_HOME to a folder that can be written to")


def test_what_is_here_needs_no_cache(closed: Path, data: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", FAMILIES[1])
    words = ["--variables.data", str(data), "--variables.model", str(model), "--model.chat_template", "chatml"]
    assert main(["prepare", "lora-chat", *words, "--output_dir", str(tmp_path / "run")]) == 0


def test_a_refusal_while_fetching_names_the_remedy() -> None:
    error = OSError("can't load the file")
    error.__cause__ = PermissionError(13, "Permission denied", "/ro/hub/x.lock")
    assert remedy(error) == "; set HF_HOME to a folder that can be written to"
    assert remedy(ValueError("no such thing")) == ""


@pytest.mark.parametrize("flag", [[], ["--dry_run"]])
def test_an_output_folder(flag: list[str], data: Path, tmp_path: Path, capsys: Any) -> None:
    model = write_model(tmp_path / "model", FAMILIES[1])
    words = ["--variables.data", str(data), "--variables.model", str(model), "--model.chat_template", "chatml"]
    capsys.readouterr()
    assert main(["run", "lora-chat", *words, "--output_dir", "/proc/run", *flag]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sft: --output_dir: can't be written to (") and line.endswith("): set another one")


def test_trying_leaves_nothing(tmp_path: Path) -> None:
    assert unwritable(tmp_path / "a" / "b") is None and list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert unwritable(tmp_path / "file" / "b") == f"{tmp_path}/file is no folder"
    assert unwritable("/proc/nowhere")


@pytest.mark.slow
def test_kernels_are_built_elsewhere_and_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    code = "from sambay_kernels.native.build import cache_folder; print(cache_folder())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, check=True
    )
    assert done.stdout.strip() == f"{tmp_path}/sambay_kernels-{os.getuid()}"
    assert "set TORCH_EXTENSIONS_DIR to a folder that can be written to" in done.stderr
    told = subprocess.run(
        [sys.executable, "-m", "sft", "doctor", "--json"], capture_output=True, text=True, timeout=120, env=environment
    )
    (found,) = [one for one in json.loads(told.stdout)["findings"] if one["what"] == "kernels' cache"]
    assert found["state"] == "note" and "set TORCH_EXTENSIONS_DIR" in found["text"]
