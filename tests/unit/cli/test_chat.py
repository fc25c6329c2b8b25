"""`sft chat` answers as its options say, whatever the model's own generation settings are, and says how."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from run_toys import write_start

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
    import transformers

    taken: list[Any] = []
    prepare = transformers.GenerationMixin._get_logits_processor

    def spying(self: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        found = prepare(self, generation_config, *args, **kwargs)
        taken.append([type(processor).__name__ for processor in found])
        return found

    monkeypatch.setattr(transformers.GenerationMixin, "_get_logits_processor", spying)
    said(plain, capsys, "--temperature", "1")
    assert taken == [[]]
    _, told = said(plain, capsys, "--temperature", "0.5", "--top_k", "3", "--repetition_penalty", "1.1")
    assert sorted(taken[1]) == ["RepetitionPenaltyLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper"]
    assert "temperature 0.5, top_p 1, top_k 3, repetition_penalty 1.1" in told


@pytest.mark.parametrize("options", [("--top_k", "-1"), ("--repetition_penalty", "0"), ("--repetition_penalty", "nan")])
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


def _ends_everywhere(model: Any) -> str:
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    return "greedy"
