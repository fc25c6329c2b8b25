"""`sft chat` answers as its options say, whatever the model's own generation settings are, and says how."""

from __future__ import annotations

import io
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from run_toys import write_start
from typing_user import types

from sft.cli.main import main
from sft.utils.files import read_json, write_json

OWN = {"do_sample": True, "top_k": 1, "temperature": 0.1, "top_p": 0.1, "repetition_penalty": 9.0, "min_new_tokens": 9}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_start(tmp_path_factory.mktemp("chat") / "plain")


@pytest.fixture(scope="module")
def opinionated(plain: Path) -> Path:
    """The same model with sampling settings of its own."""
    folder = write_start(plain.with_name("opinionated"))
    path = folder / "generation_config.json"
    write_json(path, {**read_json(path), **OWN})
    return folder


def said(model: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[str, str]:
    assert main(["chat", "--model", str(model), "--prompt", "2 + 2?", "--max_new_tokens", "12", *options]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.mark.parametrize("options", [(), ("--temperature", "1"), ("--temperature", "1", "--top_p", "0.9")])
def test_the_models_own_settings_change_nothing(
    plain: Path, opinionated: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    first, told = said(plain, capsys, *options)
    assert first == said(opinionated, capsys, *options)[0]
    assert ("sampling: temperature 1, top_p" if options else "greedy: repetition_penalty 1") in told


def test_nothing_is_between_the_options_and_the_logits(
    plain: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At temperature 1 every token can come: transformers' own default of the 50 likeliest isn't taken."""
    from sft.generate import SamplingParams, streaming

    taken: list[SamplingParams] = []
    stream = streaming.stream

    def spying(engine: Any, prompt: Any, params: SamplingParams) -> Any:
        taken.append(params)
        return stream(engine, prompt, params)

    monkeypatch.setattr(streaming, "stream", spying)
    said(plain, capsys, "--temperature", "1")
    _, told = said(plain, capsys, "--temperature", "0.5", "--top_k", "3", "--repetition_penalty", "1.1", "--seed", "4")
    assert taken == [
        SamplingParams(max_new_tokens=12, temperature=1.0),
        SamplingParams(max_new_tokens=12, temperature=0.5, top_k=3, repetition_penalty=1.1, seed=4),
    ]
    assert "temperature 0.5, top_p 1, top_k 3, repetition_penalty 1.1" in told


@pytest.mark.parametrize(
    "options", [("--top_k", "-1"), ("--repetition_penalty", "1e-300"), ("--repetition_penalty", "nan")]
)
def test_settings_that_mean_nothing_are_refused(plain: Path, options: tuple[str, ...]) -> None:
    assert main(["chat", "--model", str(plain), "--prompt", "x", *options]) == 2


# ---- a conversation at the keyboard ----


def converse(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *typed: str | BaseException
) -> tuple[str, str]:
    """What is said to lines, or to signals in their place, until end of input."""
    left = [*typed, EOFError()]

    def read(prompt: str) -> str:
        one = left.pop(0)
        if isinstance(one, BaseException):
            raise one
        return one

    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", "--model", str(model), "--max_new_tokens", "3"]) == 0
    return capsys.readouterr()


def test_ctrl_c_drops_what_is_being_typed_and_the_conversation_goes_on(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sft.train.interrupt import Stopped

    out, err = converse(plain, monkeypatch, capsys, "", Stopped(signal.SIGINT), "2 + 2?", Stopped(signal.SIGINT))
    assert out and err.count("Ctrl-D ends, /clear starts afresh") == 3 and "sft:" not in err


def test_a_signal_that_is_not_ctrl_c_ends_it(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sft.train.interrupt import Stopped

    def read(prompt: str) -> str:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", "--model", str(plain)]) == 143
    # Nothing of a conversation is kept, so no command goes on with it.
    assert capsys.readouterr().err.endswith("\nsft: interrupted\n")


def test_a_command_that_is_none_is_not_asked(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = converse(plain, monkeypatch, capsys, "/help", "/exit", "/clear")
    assert out == "" and "there is no command /help. Ctrl-D ends" in err and "there is no command /exit" in err
    assert converse(plain, monkeypatch, capsys, "/usr/bin is what?")[0]


def test_text_that_is_none_is_refused_and_the_conversation_goes_on(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    undecodable = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    out, err = converse(plain, monkeypatch, capsys, "caf\udce9", undecodable, "2 + 2?")
    assert "The prompt holds bytes that are no UTF-8 text (in the user message)." in err and out
    assert "that was no UTF-8 text" in err
    assert main(["chat", "--model", str(plain), "--prompt", "caf\udce9"]) == 1
    assert capsys.readouterr().err.endswith("bytes that are no UTF-8 text (in the user message).\n")


def test_an_answer_that_was_cut_off_is_told(
    plain: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said(plain, capsys)[1].endswith("[cut off after 12 tokens: see --max_new_tokens]\n")
    from sft.cli import chat

    # A model that ends its answer with its last token wasn't cut off.
    monkeypatch.setattr(chat, "_only_as_asked", lambda model, *rest: _ends_everywhere(model))
    assert "cut off" not in said(plain, capsys)[1]


def test_how_fast_it_was_is_told(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(r"^\[12 tokens, \d+\.\d tokens/s\]$", said(plain, capsys)[1], re.MULTILINE)


def _ends_everywhere(model: Any) -> str:
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    return "greedy"


# ---- thinking, and servers ----


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_thinking_is_dim_on_a_terminal_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from sft.cli.chat import Dimmed

    parts = [("mark", "<think>"), ("thought", "2 and 2"), ("mark", "</think>"), ("answer", "4"), ("thought", "?")]
    shown = []
    for out in (_Terminal(), io.StringIO()):
        dimmed = Dimmed(out)
        for kind, text in parts:
            dimmed.write(kind, text)
        dimmed.close()
        shown.append(out.getvalue())
    assert shown == ["\033[2m<think>2 and 2</think>\033[22m4\033[2m?\033[22m", "<think>2 and 2</think>4?"]


def test_a_server_is_asked(plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from serving_toys import NAME, running

    from sft.generate import Engine
    from sft.run.named import load_named

    options = ["--prompt", "2 + 2?", "--max_new_tokens", "12", "--temperature", "1", "--seed", "3", "--top_k", "9"]
    assert main(["chat", "--model", str(plain), *options]) == 0
    here = capsys.readouterr().out
    with running(Engine(*load_named(str(plain)), batch_size=2), api_key="key") as server:
        assert main(["chat", "--server", f"{server.url}/v1", *options]) == 1
        assert "401 Incorrect API key" in capsys.readouterr().err
        monkeypatch.setenv("SFT_API_KEY", "key")
        assert main(["chat", "--server", f"{server.url}/v1/", *options]) == 0
        out, err = capsys.readouterr()
        assert out == here and f"{NAME} at {server.url}/v1, sampling: temperature 1, top_p 1, top_k 9" in err
        assert "[12 tokens, " in err and err.endswith("[cut off after 12 tokens: see --max_new_tokens]\n")
        assert main(["chat", "--server", f"{server.url}/v1", *options, "--model", "other"]) == 1
        assert "404 The model `other` does not exist" in capsys.readouterr().err
        assert main(["chat", "--server", f"{server.url}/v1", "--prompt", "<|end|>"]) == 1
        assert "spells out <|end|>" in capsys.readouterr().err
    assert main(["chat", "--server", f"{server.url}/v1", *options]) == 1
    assert "can't be reached" in capsys.readouterr().err


def test_a_servers_thinking_is_shown_and_not_sent_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sft.cli import chat

    asked: list[Any] = []

    def answer(server: Any, fields: Any) -> Any:
        asked.append([dict(message) for message in fields["messages"]])
        yield from [("thought", "2 and 2"), ("answer", "4"), ("finish", "stop"), ("tokens", "5")]

    monkeypatch.setattr(chat, "ask", answer)
    types(monkeypatch, "2 + 2?", "more")
    assert main(["chat", "--server", "http://h/v1", "--model", "m"]) == 0
    assert asked[1][1] == {"role": "assistant", "content": "4"}
    assert capsys.readouterr().out == "2 and 24\n" * 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--server", "localhost:8000"], "is no http address"),
        (["--server", "http://h/v1", "--config", "r.yaml"], "--config has no effect with --server"),
        (["--server", "http://h/v1", "--model.dtype", "float32"], "--model.dtype has no effect with --server"),
        (["--model", "MODEL", "--api_key", "k"], "--api_key has no effect without --server"),
    ],
)
def test_options_that_dont_go_together(
    plain: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert main(["chat", *(word.replace("MODEL", str(plain)) for word in words), "--prompt", "x"]) == 2
    assert told in capsys.readouterr().err
