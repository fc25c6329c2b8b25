"""What rows say beside their messages' text reaches the template as transformers would hand it over, or is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from sft.data.read.columns import choose_columns
from sft.data.read.conversation import Extras, to_extras, to_messages
from sft.data.read.message import context_only
from sft.data.read.row import BadRow
from sft.data.tokenize.render import Rendered, Renderer
from sft.data.tokenize.tokens import tokenize
from sft.recipe.schema import Templates

FUNCTION = {
    "name": "add_up",
    "description": "Adds <numbers> & more",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "the first"}}},
}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL: dict[str, Any] = {"id": "call00001", "type": "function", "function": {"name": "add_up", "arguments": {"a": 2}}}
ASKED, SAID = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is four."}
CALLED: list[dict[str, Any]] = [
    ASKED,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "name": "add_up", "tool_call_id": "call00001"},
    SAID,
]


def _with(tokenizer: Any, name: str) -> Any:
    import trl

    other = copy.deepcopy(tokenizer)
    other.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}_training.jinja").read_text("utf-8")
    return other


def _read(row: dict[str, Any]) -> tuple[Any, list[int], Extras]:
    mapping = choose_columns("rows", row, None)
    messages, extras = to_messages(row, mapping, Templates()), to_extras(row, mapping)
    assert isinstance(messages, list) and isinstance(extras, Extras), (messages, extras)
    return messages, context_only(messages), extras


def _render(tokenizer: Any, row: dict[str, Any]) -> Rendered | BadRow:
    messages, untrained, extras = _read(row)
    return Renderer(tokenizer).render(messages, untrained, *extras)


def _same(tokenizer: Any, row: dict[str, Any], other: dict[str, Any]) -> str:
    one, two = _render(tokenizer, row), _render(tokenizer, other)
    assert isinstance(one, Rendered) and one == two
    return one.text


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "qwen3_6", "nemotron_3_nano", "lfm2_v2"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
def test_calls_and_tools_give_the_ids_and_mask_of_transformers(toy: Any, name: str, tools: Any) -> None:
    tokenizer = _with(toy, name)
    rendered = _render(tokenizer, {"messages": CALLED, "tools": tools})
    assert isinstance(rendered, Rendered)
    theirs = tokenizer.apply_chat_template(CALLED, tools=tools, return_assistant_tokens_mask=True, return_dict=True)
    tokens = next(tokenize(tokenizer, [rendered]))
    assert tokens.ids.tolist() == theirs["input_ids"] and tokens.mask.tolist() == theirs["assistant_masks"]
    assert "add_up" in "".join(rendered.text[start:end] for start, end in rendered.spans)


@pytest.mark.parametrize(
    "call",
    [
        {"tool_calls": [{"function": FUNCTION | {"arguments": {"a": 2}}}]},
        {"tool_calls": [{"name": "add_up", "arguments": {"a": 2}}]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [json.dumps(CALL)]},
        {"function_call": {"name": "add_up", "arguments": {"a": 2}}},
        {"function_call": {"name": "add_up", "arguments": '{"a": 2}'}},
        {"tool_calls": [CALL], "content": None},
    ],
)
def test_every_way_to_write_a_call_is_the_same_conversation(toy: Any, call: dict[str, Any]) -> None:
    role = "function" if "function_call" in call else "tool"
    row = [ASKED, {"role": "assistant", **call}, {"role": role, "content": "4", "name": "add_up"}, SAID]
    text = _same(_with(toy, "qwen3"), {"messages": row}, {"messages": CALLED})
    assert '{"name": "add_up", "arguments": {"a": 2}}' in text


def test_a_call_beside_content_keeps_both(toy: Any) -> None:
    call = {"role": "assistant", "content": "Let me add.", "function_call": {"name": "add_up", "arguments": '{"a": 2}'}}
    rendered = _render(_with(toy, "qwen3"), {"messages": [ASKED, call]})
    assert isinstance(rendered, Rendered)
    trained = "".join(rendered.text[start:end] for start, end in rendered.spans)
    assert "Let me add." in trained and '"arguments": {"a": 2}' in trained


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "deepseekv3"])
def test_arguments_given_as_text_are_never_put_in_quotes(toy: Any, name: str) -> None:
    tokenizer = _with(toy, name)
    calls = [CALLED[0], {**CALLED[1], "tool_calls": [{**CALL, "function": {"name": "add_up", "arguments": '{"a":2}'}}]}]
    rendered = _render(tokenizer, {"messages": [*calls, *CALLED[2:]]})
    assert isinstance(rendered, Rendered) and '\\"a\\"' not in rendered.text


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]])
def test_tools_of_a_row_are_text_in_phis_system_message(toy: Any, tools: Any) -> None:
    plain = {"role": "system", "content": "", "tools": json.dumps(TOOLS, ensure_ascii=False)}
    text = _same(toy, {"messages": [ASKED, SAID], "tools": tools}, {"messages": [plain, ASKED, SAID]})
    assert text.startswith(f"<|system|><|tool|>{json.dumps(TOOLS)}<|/tool|><|end|><|user|>")
    own = {"role": "system", "content": "Be brief."}
    _same(toy, {"messages": [own, ASKED, SAID], "tools": tools}, {"messages": [own | {"tools": TOOLS}, ASKED, SAID]})


def test_tools_of_a_system_message_reach_a_template_that_takes_a_list(toy: Any) -> None:
    own = {"role": "system", "content": "Be brief."}
    by_row, by_message = ([own, ASKED, SAID], TOOLS), ([{**own, "tools": TOOLS}, ASKED, SAID], None)
    rows = [{"messages": messages, "tools": tools} for messages, tools in (by_row, by_message)]
    assert "add_up" in _same(_with(toy, "qwen3"), *rows)


def test_context_only_messages_are_counted_without_the_one_put_in_front(toy: Any) -> None:
    row = {"messages": [ASKED, {**SAID, "weight": 0}, ASKED, SAID | {"content": "4"}], "tools": TOOLS}
    rendered = _render(toy, row)
    assert isinstance(rendered, Rendered)
    assert "".join(rendered.text[start:end] for start, end in rendered.spans) == "4<|end|><|endoftext|>"


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        (None, {"messages": CALLED}, "tool_calls"),
        (None, {"messages": CALLED, "tools": TOOLS}, "tool_calls"),
        ("llama3", {"messages": CALLED}, "tool_calls"),
        ("llama3", {"messages": [ASKED, SAID], "tools": TOOLS}, "tools"),
        (
            "llama3",
            {"messages": [{"role": "user", "content": "Say add_up."}, SAID], "tools": TOOLS},
            "tools",
        ),
        (None, {"messages": [{"role": "system", "content": "", "tools": "[1]"}, ASKED, SAID], "tools": TOOLS}, "tools"),
        (None, {"messages": [ASKED, SAID], "tools": [{"name": "<|end|>"}]}, "control_token"),
        (None, {"messages": [ASKED, SAID], "chat_template_kwargs": {"date": "now"}}, "chat_template_kwargs"),
        ("qwen3", {"messages": [ASKED, SAID], "chat_template_kwargs": {"x": ["<|end|>"]}}, "control_token"),
    ],
)
def test_what_a_template_has_no_place_for_is_refused(
    toy: Any, name: str | None, row: dict[str, Any], reason: str
) -> None:
    bad = _render(toy if name is None else _with(toy, name), row)
    assert isinstance(bad, BadRow) and bad.reason == reason and bad.detail


def test_template_arguments_reach_the_template(toy: Any) -> None:
    other = copy.deepcopy(toy)
    other.chat_template = "{% if mood is defined %}<|system|>{{ mood }}<|end|>{% endif %}" + toy.chat_template
    rendered = _render(other, {"messages": [ASKED, SAID], "chat_template_kwargs": {"mood": "glad", "other": None}})
    assert isinstance(rendered, Rendered) and rendered.text.startswith("<|system|>glad<|end|><|user|>")
    # A switch that the template doesn't have changes nothing, as with TRL.
    switched = {"messages": [ASKED, SAID], "chat_template_kwargs": '{"enable_thinking": false}'}
    _same(toy, switched, {"messages": [ASKED, SAID]})


@pytest.mark.parametrize("prompt", ["2+2?", [ASKED], ASKED])
@pytest.mark.parametrize("completion", ["It is four.", [SAID], SAID])
def test_prompt_and_completion_may_be_messages(toy: Any, prompt: Any, completion: Any) -> None:
    _same(toy, {"prompt": prompt, "completion": completion}, {"messages": [ASKED, SAID]})


def test_a_prompts_answers_are_context_as_with_trl(toy: Any) -> None:
    prompt = [{"role": "developer", "content": "Be brief."}, ASKED, SAID, {"role": "user", "content": "Sure?"}]
    rendered = _render(toy, {"prompt": prompt, "completion": [{"role": "assistant", "content": "Yes."}]})
    assert isinstance(rendered, Rendered) and rendered.text.startswith("<|system|>Be brief.<|end|><|user|>")
    tokens = next(tokenize(toy, [rendered]))
    plain = [{**prompt[0], "role": "system"}, *prompt[1:]]
    before = toy.apply_chat_template(plain, add_generation_prompt=True)["input_ids"]
    whole = toy.apply_chat_template([*plain, {"role": "assistant", "content": "Yes."}])["input_ids"]
    assert tokens.ids.tolist() == whole and tokens.mask.tolist() == [0] * len(before) + [1] * (len(whole) - len(before))
