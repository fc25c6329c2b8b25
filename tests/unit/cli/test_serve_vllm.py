"""`sft serve --engine vllm`: the command line that vLLM gets, and what is refused before."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sft.cli import serve
from sft.cli.main import main
from sft.serve import vllm_engine
from sft.serve.vllm_engine import check_vllm_installed
from sft.utils.errors import UsageError, UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi4flash", "max_position_embeddings": 4096}))
    return tmp_path


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(["--engine", "vllm", *words])


def test_our_options_have_their_names_there(folder: Path) -> None:
    words = ["--host", "0.0.0.0", "--port", "8100", "--served_model_name", "ours", "--max_length", "2048"]
    asked = serve.vllm_server(parsed("--model", str(folder), *words, "--batch_size", "7", "--trust_remote_code"))
    assert asked.arguments() == [
        "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--host", "0.0.0.0", "--port", "8100", "--served-model-name", "ours",
        "--max-model-len", "2048", "--max-num-seqs", "7", "--trust-remote-code",
    ]  # fmt: skip


def test_the_length_is_the_models_but_at_most_ours(folder: Path) -> None:
    assert serve.vllm_server(parsed("--model", str(folder))).max_length == 4096
    assert serve.vllm_server(parsed("--model", "name/on-the-hub")).max_length == serve.LONGEST


@pytest.mark.parametrize("option", [*serve.OWN_ALONE])
def test_what_vllm_does_not_know_is_refused_by_name(folder: Path, option: str) -> None:
    with pytest.raises(UsageError, match=f"--{option} is an option of our own engine"):
        serve.vllm_server(parsed("--model", str(folder), f"--{option}", "17"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reasoning", "separate"], "--reasoning separate"),
        (["--port", "0"], "--port 0"),
    ],
)
def test_values_that_it_can_not_have_are_refused(folder: Path, words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        serve.vllm_server(parsed("--model", str(folder), *words))


def test_a_run_has_to_be_exported_first() -> None:
    with pytest.raises(UsageError, match="sft export"):
        serve.vllm_server(parsed("--config", "tiny"))


def test_what_is_not_installed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: set[str] = set()
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda name: name if name in there else None)
    with pytest.raises(UserError, match="needs vllm and sambay-vllm: pip install vllm sambay-vllm"):
        check_vllm_installed(str(folder))
    there.add("vllm")
    with pytest.raises(UserError, match="needs sambay-vllm"):
        check_vllm_installed(str(folder))
    check_vllm_installed("another/model")
    there.add("sambay_vllm")
    check_vllm_installed(str(folder))


def test_this_process_becomes_vllm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[Any] = []
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(os, "execv", lambda program, words: became.append((words, os.environ["VLLM_API_KEY"])))
    monkeypatch.setenv("VLLM_API_KEY", "another")
    main(["serve", "--engine", "vllm", "--model", str(folder), "--api_key", "secret"])
    ((words, key),) = became
    assert words[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    assert key == "secret" and "secret" not in words
