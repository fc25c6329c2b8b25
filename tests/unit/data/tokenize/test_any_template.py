"""Chat templates of other models: what is trained is found in what they render, all of it, or the row is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from sft.data.read.row import BadRow
from sft.data.tokenize.render import Rendered, Renderer
from sft.data.tokenize.template import training_template
from sft.data.tokenize.tokens import tokenize
from sft.recipe.chat_templates import families
from sft.tokenizers.templates import known_template, trained_twin
from sft.utils.errors import UserError

# With a training twin of TRL's; those whose marks take in the answer's header (which the prompt ends with) aside.
TWINS = ["cohere", "gemma", "gemma3", "lfm2", "llama3", "phi3", "qwen2_5", "qwen3", "qwen3_6", "qwen3_8"]
HEADER_MARKED = ["deepseekv3", "deepseek_r1_distill", "gptoss"]
# Of models that TRL has no twin for.
BARE = ["llama3_1", "llama3_2", "gemma4", "gemma4_v5", "lfm2_2_5", "chatml"]
PICTURES = {"idefics3", "llava_next", "smolvlm"}  # their messages are lists of parts

THINKING = "<think>\nTwo and two.\n</think>\n\nIt is four."
PLAIN = [("user", "What is 2+2?"), ("assistant", "It is four."), ("user", "Add 4."), ("assistant", "four, so 8 \u00e9")]
THOUGHT = [("user", "What is 2+2?"), ("assistant", THINKING)]
THOUGHT_TWICE = [*THOUGHT, ("user", "Add 4."), ("assistant", "<think>4 and 4.</think>8")]


def with_template(tokenizer: Any, template: str) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def turns(said: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in said]


def rendered(tokenizer: Any, family: str, messages: list[dict[str, Any]], **options: Any) -> Rendered | BadRow:
    return Renderer(with_template(tokenizer, known_template(family))).render(messages, **options)


def trained(found: Rendered | BadRow) -> list[str]:
    assert isinstance(found, Rendered), found
    return [found.text[start:end] for start, end in found.spans]


@pytest.mark.parametrize("said", [PLAIN, THOUGHT, THOUGHT_TWICE], ids=["plain", "thought", "thought twice"])
@pytest.mark.parametrize("family", sorted(set(families()) - PICTURES))
def test_every_known_template_trains_all_that_is_said_or_refuses(
    toy: Any, family: str, said: list[tuple[str, str]]
) -> None:
    """Checked without the marks that the renderer goes by: words in order, and no more than the format around them."""
    found = rendered(toy, family, turns(said))
    if isinstance(found, BadRow):
        assert found.reason == "lost_text" and said is not PLAIN
        return
    parts = trained(found)
    answers = [content for role, content in said if role == "assistant"]
    assert len(parts) == len(answers)
    for part, answer in zip(parts, answers, strict=True):
        rest = part
        for words in filter(None, (w.strip() for w in answer.replace("</think>", "<think>").split("<think>"))):
            before, stands, rest = rest.partition(words)
            assert stands and not any(text.strip() in before for role, text in said if role == "user")
        assert rest.strip().startswith(("<", "[")), "no token ends the turn"


@pytest.mark.parametrize("family", TWINS)
def test_ids_and_masks_equal_trls(toy: Any, family: str) -> None:
    twin = trained_twin(known_template(family))
    assert twin is not None
    found = rendered(toy, family, turns(PLAIN))
    assert isinstance(found, Rendered)
    theirs = toy.apply_chat_template(
        turns(PLAIN), chat_template=twin, return_assistant_tokens_mask=True, return_dict=True
    )
    ours = next(tokenize(toy, [found]))
    assert ours.ids.tolist() == theirs["input_ids"] and ours.mask.tolist() == theirs["assistant_masks"]
    assert ours.supervised


@pytest.mark.parametrize("family", HEADER_MARKED)
def test_what_a_prompt_ends_with_is_not_trained(toy: Any, family: str) -> None:
    """TRL's marks begin before the assistant's header, which no model has to say."""
    header = {"gptoss": "<|start|>assistant"}.get(family, "<\uff5cAssistant\uff5c>")
    found = rendered(toy, family, turns(PLAIN))
    assert not any(header in part for part in trained(found)) and header in getattr(found, "text", "")


@pytest.mark.parametrize("family", ["llama3", "cohere", "cohere2", "muse_glimmer"])
def test_answers_are_found_where_trl_marks_them(toy: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same spans without the twin as with it."""
    marked = trained(rendered(toy, family, turns(THOUGHT_TWICE)))
    monkeypatch.setattr("sft.data.tokenize.template.trained_twin", lambda template: None)
    assert trained(rendered(toy, family, turns(THOUGHT_TWICE))) == marked


@pytest.mark.parametrize("family", BARE)
def test_templates_without_marks_train_answer_and_end(toy: Any, family: str) -> None:
    end = {"llama3_1": "<|eot_id|>", "llama3_2": "<|eot_id|>", "gemma4": "<turn|>", "gemma4_v5": "<turn|>"}
    found = trained(rendered(toy, family, turns(PLAIN)))
    assert [part.strip() for part in found] == [
        content + end.get(family, "<|im_end|>") for role, content in PLAIN if role == "assistant"
    ]
    assert len(trained(rendered(toy, family, turns(PLAIN), untrained=[1]))) == 1


@pytest.mark.parametrize(
    ("family", "said"),
    [("deepseekv3", THOUGHT), *((name, THOUGHT_TWICE) for name in ("nemotron_3_nano", "glm4moe", "lfm2_2_5"))],
)
def test_lost_thinking_is_refused(toy: Any, family: str, said: list[tuple[str, str]]) -> None:
    found = rendered(toy, family, turns(said))
    assert isinstance(found, BadRow) and found.reason == "lost_text" and "Two and two." in found.detail
    if said is THOUGHT_TWICE:  # what isn't trained may be left out, as it is when a model is asked
        assert "Two and two." not in "".join(trained(rendered(toy, family, turns(said), untrained=[1])))


def test_thinking_goes_where_the_template_wants_it(toy: Any) -> None:
    """Qwen 3.8's puts an empty thought before one that stands in the content."""
    (part,) = trained(rendered(toy, "qwen3_8", turns(THOUGHT)))
    assert part.startswith("<think>\nTwo and two.\n</think>\n\nIt is four.") and part.count("<think>") == 1


def test_a_dropped_system_message_is_refused(toy: Any) -> None:
    skipped = "{% if message.role == 'system' %}{% continue %}{% endif %}{{ '<|im"
    template = known_template("chatml").replace("{{ '<|im", skipped, 1)
    found = Renderer(with_template(toy, template)).render(turns([("system", "Be kind."), *PLAIN]))
    assert isinstance(found, BadRow) and found.reason == "lost_text" and "system" in found.detail


CALL = {"type": "function", "function": {"name": "add", "arguments": {"words": 'a "b" \u00e9', "n": 2}}}
TOOLS = '[{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}]'


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "llama3_1", "llama3_2"])
def test_tool_calls_are_rendered_and_trained(toy: Any, family: str) -> None:
    asked = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    messages = [{"role": "system", "content": "Help.", "tools": TOOLS}, *turns([("user", "Add.")]), asked]
    messages += turns([("tool", "5"), ("assistant", "It is 5.")])
    found = rendered(toy, family, messages)
    called, said = trained(found)
    assert "add" in called and "\\u00e9" not in called and "It is 5." in said
    assert isinstance(found, Rendered) and "Adds." in found.text


def test_tools_and_calls_that_a_template_leaves_out_are_refused(toy: Any) -> None:
    asked = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}
    for messages in (
        [*turns([("user", "Add.")]), asked],
        [{"role": "system", "content": "Help.", "tools": TOOLS}, *turns(PLAIN)],
    ):
        found = rendered(toy, "chatml", messages)
        assert isinstance(found, BadRow) and found.reason in ("tool_calls", "tools")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "nothing ends its answers"),
        ("{% for m in messages %}<s>{{ m.content[:5] }}</s>{% endfor %}", "loses what the user says"),
        ("{% for m in messages %}\n{{ m.content }", r"\(line 2\)"),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
    ],
)
def test_templates_that_nothing_can_be_proved_of_are_refused(toy: Any, template: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        training_template(with_template(toy, template))


@pytest.mark.parametrize("edit", ["{{ m.content | length }}", "{{ m.content | replace('o', '0') }}"])
def test_templates_that_change_the_words_are_refused(toy: Any, edit: str) -> None:
    template = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}" + edit + "</s>{% endfor %}"
    renderer_of = with_template(toy, template)
    try:
        found = Renderer(renderer_of).render(turns(PLAIN))
    except UserError:
        return
    assert isinstance(found, BadRow)
