"""Templates that write the day's date say the same on every day."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from data_toys import byte_tokenizer, stage_of

from sft.data.prepare import prepare_stage
from sft.tokenizers.dates import DATE, reads_clock, with_fixed_date
from sft.tokenizers.prompt import prompt_text
from sft.tokenizers.templates import known_template
from sft.tokenizers.turns import render

# As Llama 3.2's: the row's own date, else the clock's.
DATED = (
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{- '<|system|>Today: ' + date_string + '<|end|>' }}"
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
ROWS: list[dict[str, Any]] = [
    {"prompt": "2+2?", "completion": "4"},
    {"prompt": "3+3?", "completion": "6", "chat_template_kwargs": {"date_string": "01 Jan 1999"}},
]


@pytest.fixture
def tomorrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' clock, moved."""

    class Moved(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2031, 2, 3, tzinfo=tz)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Moved)


def _dated(template: str = DATED) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def _rows(folder: Path) -> tuple[str, list[str], list[int]]:
    source = folder / "rows.jsonl"
    folder.mkdir()
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = stage_of([{"path": str(source)}], folder / "out", {"dataset_num_proc": 1}, {})
    tokenizer = _dated()
    prepared = prepare_stage(recipe, recipe.stages[0], tokenizer)
    rows = prepared.dataset[:]
    trained = [sum(mask) for mask in rows["assistant_masks"]]
    return prepared.manifest["key"], [tokenizer.decode(ids) for ids in rows["input_ids"]], trained


def test_rows_are_the_same_on_every_day(
    tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    today = _rows(tmp_path / "today")
    assert "writes the day's date" in capsys.readouterr().err
    request.getfixturevalue("tomorrow")
    assert _rows(tmp_path / "tomorrow") == today
    assert ["Today: 26 Jul 2024" in text for text in today[1]] == [True, False]
    assert "Today: 01 Jan 1999" in today[1][1]


def test_problems_are_asked_as_rows_are_trained(tomorrow: None) -> None:
    said = prompt_text(_dated(), [{"role": "user", "content": "2+2?"}])
    assert said == "<|system|>Today: 26 Jul 2024<|end|><|user|>2+2?<|end|><|assistant|>"


@pytest.mark.parametrize(
    "text", ["%d %b %Y", "%Y-%m-%d", "%A, %B %-d, %Y", "%H:%M:%S %p", "100%% on %j", "%y%U", "none"]
)
def test_a_date_is_written_as_the_clock_would(text: str) -> None:
    template = f"{{{{ strftime_now({text!r}) }}}}{{% for m in messages %}}{{{{ m['content'] }}}}{{% endfor %}}"
    assert render(template, [{"role": "user", "content": "|x"}], {}) == DATE.strftime(text) + "|x"


@pytest.mark.parametrize("family", ["llama3_2", "gptoss"])
def test_real_templates_have_no_clock_left(family: str, tomorrow: None) -> None:
    template = known_template(family)
    said = render(template, [{"role": "user", "content": "2+2?"}], {"bos_token": "<s>"})
    assert reads_clock(template) and "2024" in said and "2031" not in said


def test_other_templates_stay_as_they_are() -> None:
    assert with_fixed_date("{{ messages }}") == "{{ messages }}"
    assert with_fixed_date(DATED).count("\n") == DATED.count("\n")
