"""The training template renders what the published one renders, and marks what is learned."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from sft.data.tokenize.render import Rendered, Renderer
from sft.data.tokenize.template import TRAINING_TEMPLATE, training_template
from sft.tokenizers.templates import PUBLISHED_TEMPLATE
from sft.utils.errors import UserError

CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}],
    "several turns with thoughts": [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\nadd\n</think>\n\n2 "},
        {"role": "user", "content": " times 3?\n"},
        {"role": "assistant", "content": "\n<think>\n\n2*3\n</think>6 \u00e9\U0001f600"},
    ],
    "system": [{"role": "system", "content": ""}, *[{"role": r, "content": r} for r in ("user", "assistant")]],
    "tools": [
        {"role": "system", "content": "Use tools.", "tools": '[{"name": "add", "parameters": {"a": "{% x %}"}}]'},
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "<|tool_call|>[add]<|/tool_call|>"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "{{ 2 }}"},
    ],
    "ends with the user": [{"role": r, "content": r} for r in ("user", "assistant", "user")],
    "without an answer": [{"role": "user", "content": "hm"}],
}


def _render(tokenizer: Any, messages: list[dict[str, str]], template: str, prompt: bool) -> str:
    return str(
        tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=prompt)
    )


@pytest.mark.parametrize("prompt", [False, True], ids=["whole", "generation prompt"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_text_equals_the_published_one(toy: Any, name: str, prompt: bool) -> None:
    messages = CONVERSATIONS[name]
    published = _render(toy, messages, PUBLISHED_TEMPLATE, prompt)
    assert _render(toy, messages, TRAINING_TEMPLATE, prompt) == published
    if not prompt:
        rendered = Renderer(toy).render(messages)
        assert isinstance(rendered, Rendered) and rendered.text == published


def test_gsm8k_text_equals_the_published_file(phi: Any, shared_dir: Path, gsm8k: list[dict[str, str]]) -> None:
    folder = shared_dir / "models" / "Phi-4-mini-flash-reasoning"
    published = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert published == PUBLISHED_TEMPLATE
    renderer = Renderer(phi)
    for row in gsm8k[:200]:
        messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        rendered = renderer.render(messages)
        assert isinstance(rendered, Rendered)
        assert rendered.text == _render(phi, messages, published, False)
        assert rendered.text == f"<|user|>{row['question']}<|end|><|assistant|>{row['answer']}<|end|><|endoftext|>"


def test_marks_cover_answers_and_end_tokens(toy: Any) -> None:
    rendered = Renderer(toy).render(CONVERSATIONS["several turns with thoughts"])
    assert isinstance(rendered, Rendered)
    answers = [m["content"] for m in CONVERSATIONS["several turns with thoughts"] if m["role"] == "assistant"]
    marked = [rendered.text[start:end] for start, end in rendered.spans]
    assert marked == [answers[0] + "<|end|>", answers[1] + "<|end|><|endoftext|>"]


def test_last_end_of_text_is_not_trained_after_a_user_turn(toy: Any) -> None:
    rendered = Renderer(toy).render(CONVERSATIONS["ends with the user"])
    assert isinstance(rendered, Rendered)
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["assistant<|end|>"]


def test_template_with_its_own_marks_is_taken_as_it_is(toy: Any) -> None:
    other = copy.deepcopy(toy)
    other.chat_template = "{% for m in messages %}{%- generation -%}{{ m['content'] }}{%- endgeneration -%}{% endfor %}"
    assert training_template(other) == other.chat_template


def test_template_that_trl_knows_gets_its_twin(toy: Any) -> None:
    trl = pytest.importorskip("trl.chat_template_utils")
    other = copy.deepcopy(toy)
    other.chat_template = trl.qwen3_chat_template
    assert training_template(other) == trl.qwen3_training_chat_template
    rendered = Renderer(other).render(CONVERSATIONS["one turn"])
    assert isinstance(rendered, Rendered)
    assert any("2" in rendered.text[start:end] for start, end in rendered.spans)


@pytest.mark.parametrize(
    "body",
    [
        "{{ m['content'] }}{% generation %}{% endgeneration %}",
        "{% generation %}{{ m['content'] }}{% endgeneration %}<|end|>",
        "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}",
    ],
    ids=["nothing", "without the end token", "the user's too"],
)
def test_wrong_marks_are_refused(toy: Any, body: str) -> None:
    other = copy.deepcopy(toy)
    other.chat_template = "{% for m in messages %}" + body + "{% endfor %}"
    with pytest.raises(UserError, match="marks the wrong part"):
        Renderer(other)


@pytest.mark.parametrize(("template", "said"), [(None, "no chat template"), ("{{ messages }}", "generation")])
def test_other_templates_are_refused(toy: Any, template: str | None, said: str) -> None:
    other = copy.deepcopy(toy)
    other.chat_template = template
    with pytest.raises(UserError, match=said):
        training_template(other)
