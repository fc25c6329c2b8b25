"""`sft chat` answers as its options say, whatever the model's own generation settings are, and says how."""

from __future__ import annotations

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
