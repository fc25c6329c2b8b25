"""How a server begins and ends, as a process of its own: `sft serve`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from children import read_line
from http_client import httpx
from run_toys import write_start
from serving_toys import Running, chat, running, served

from sft.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_start(tmp_path_factory.mktemp("serve") / "model")


def ask(url: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=chat(**fields), timeout=120)


def test_sigterm_finishes_what_is_under_way_and_refuses_the_new(model: Path) -> None:
    with (
        served(model, "--served_model_name", "toy", "--batch_size", "2") as (process, url, _),
        ThreadPoolExecutor(2) as pool,
    ):
        whole = pool.submit(ask, url, max_tokens=2000, temperature=0)
        events = pool.submit(ask, url, max_tokens=2000, temperature=0, stream=True)
        while "sft_slots_used 2\n" not in httpx.get(f"{url}/metrics").text:
            assert not whole.done()
        process.send_signal(signal.SIGTERM)
        assert "2 requests are finished" in read_line(process.stderr)
        refused = ask(url)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "unavailable_error")
        assert refused.headers["retry-after"] and httpx.get(f"{url}/health").status_code == 503
        made = whole.result(timeout=120).json()
        assert made["usage"]["completion_tokens"] == 2000
        text = events.result(timeout=120).text
        assert text.endswith("data: [DONE]\n\n") and '"finish_reason": "length"' in text and "error" not in text
        assert process.wait(30) == 0
        assert process.stderr is not None and process.stderr.read() == ""  # bounded: it has ended


def test_what_isnt_done_in_time_is_told(model: Path) -> None:
    with (
        served(model, "--served_model_name", "toy", "--drain_timeout", "0.2") as (process, url, _),
        ThreadPoolExecutor(2) as pool,
    ):
        asked = [pool.submit(ask, url, max_tokens=30_000, temperature=0, stream=stream) for stream in (False, True)]
        while "sft_slots_used 2\n" not in httpx.get(f"{url}/metrics").text:
            assert not asked[0].done()
        process.send_signal(signal.SIGINT)
        whole, events = (one.result(timeout=60) for one in asked)
        assert whole.status_code == 503 and "has stopped" in whole.json()["error"]["message"]
        assert "has stopped" in events.text and events.text.endswith("data: [DONE]\n\n")
        assert process.wait(30) == 1
        assert process.stderr is not None
        assert process.stderr.read().endswith("requests that got no whole answer: 2\n")  # bounded: it has ended


def test_a_run_is_served_by_its_recipe(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--config", "nosuch.yaml"]) in (1, 2)
    assert "nosuch.yaml: no such recipe file" in capsys.readouterr().err


def test_an_idle_server_ends_at_once() -> None:
    with running() as server:
        server.listener.stop()
        server.until(lambda: server.finished is not None, 10)
    assert server.finished is True


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        ([], 2, "say which model answers"),
        (["--model", "./gone"], 2, "--model: no model at ./gone"),
        (["--model", "MODEL", "--port", "70000"], 2, "from 0 (any free one) to 65535"),
        (["--model", "MODEL", "--port", "TAKEN"], 1, "can't serve at 127.0.0.1:TAKEN"),
        (["--model", "MODEL", "--host", "no.such.host.invalid"], 1, "can't serve at no.such.host.invalid:8000"),
        (["--model", "MODEL", "--port", "0", "--max_length", "1000000000"], 1, "the model's positions end at"),
        (["--model", "MODEL", "--timeout", "nan"], 2, "must be above 0"),
        (["--model", "MODEL", "--train.seed", "1"], 2, "unknown argument '--train.seed'"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    server: Running, model: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, told: str
) -> None:
    named = {"MODEL": str(model), "TAKEN": str(server.listener.port)}
    assert main(["serve", *(named.get(word, word) for word in words)]) == status
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sft: ")]
    assert told.replace("TAKEN", named["TAKEN"]) in line


def test_without_the_extra_one_sentence_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--model", str(model)]) == 1
    assert "pip install 'sambay-sft[serve]'" in capsys.readouterr().err


def test_all_modules_can_be_had_without_the_extra() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['fastapi', 'uvicorn', 'starlette']));"
        "import pkgutil, importlib, sft.serve as room;"
        "print([importlib.import_module(m.name).__name__ for m in pkgutil.walk_packages(room.__path__, 'sft.serve.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "sft.serve.listen" in done.stdout, done.stderr


def test_the_server_is_threads_not_processes(server: Running) -> None:
    """One engine's thread for all clients."""
    assert [thread.name for thread in threading.enumerate()].count("engine") == 1
    assert json.loads(server.post(chat()).text)["usage"]
