"""The mask trains the assistant's tokens, end tokens included, and nothing else."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

import sft.data.tokenize.tokens as tokens_module
from sft.data.read.row import BadRow
from sft.data.tokenize.render import Rendered, Renderer
from sft.data.tokenize.tokens import Tokens, most_characters, tokenize, tokenizer_hash
from sft.utils.errors import UserError

ANSWERS = ["four", "\n\n<think>\n 2+2 \n</think>\n4", "  4", "\u00e9\U0001f600 \u0301x", "a\n", "4<"]


def _tokens(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[Rendered, Tokens]:
    rendered = Renderer(tokenizer).render(messages)
    assert isinstance(rendered, Rendered)
    return rendered, next(tokenize(tokenizer, [rendered]))


def _conversation(*answers: str) -> list[dict[str, str]]:
    turns = [("user", " 2+2?\n") if i % 2 == 0 else ("assistant", answers[i // 2]) for i in range(2 * len(answers))]
    return [{"role": role, "content": content} for role, content in turns]


def _by_offsets(tokenizer: Any, rendered: Rendered) -> list[int]:
    offsets = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    mask = [int(any(start <= at < end for start, end in rendered.spans)) for at, _ in offsets]
    return [0, *mask[1:]]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", ["toy", "phi"])
def test_trained_tokens_decode_to_the_answers(name: str, answer: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    _, tokens = _tokens(tokenizer, _conversation(answer, "then 5"))
    trained = tokenizer.decode(tokens.ids[tokens.mask == 1])
    # The chat tokens swallow the whitespace after them; nothing else may differ.
    assert trained == f"{answer.lstrip()}<|end|>then 5<|end|><|endoftext|>"


@pytest.mark.parametrize("name", ["toy", "phi"])
def test_whitespace_first_does_not_train_the_role_token(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    _, tokens = _tokens(tokenizer, _conversation("\n<think>"))
    role = tokens.ids == tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert role.sum() == 1 and tokens.mask[role].sum() == 0
    assert tokens.mask[np.flatnonzero(role)[0] + 1] == 1


def test_end_tokens_are_trained_although_pad_is_eos(phi: Any) -> None:
    assert phi.pad_token_id == phi.eos_token_id == 199999
    _, tokens = _tokens(phi, _conversation("4", "5"))
    assert tokens.ids[-2:].tolist() == [200020, 199999]
    assert tokens.mask[-2:].tolist() == [1, 1]
    ends = np.flatnonzero(tokens.ids == 200020)
    assert tokens.mask[ends].tolist() == [0, 1, 0, 1]  # user, assistant, user, assistant


def test_mask_equals_transformers_own_where_that_is_right(phi: Any, gsm8k: list[dict[str, str]]) -> None:
    renderer = Renderer(phi)
    for row in gsm8k[:50]:
        messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        _, tokens = _tokens(phi, messages)
        theirs = phi.apply_chat_template(
            messages, chat_template=renderer.template, return_assistant_tokens_mask=True, return_dict=True
        )
        assert tokens.ids.tolist() == theirs["input_ids"]
        assert tokens.mask.tolist() == theirs["assistant_masks"]


texts = st.text(st.sampled_from("ab \n\t\u00e9\U0001f600\u0301<|>12"), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(answers=st.lists(texts, min_size=1, max_size=3))
def test_mask_equals_the_one_from_every_offset(toy: Any, answers: list[str]) -> None:
    rendered, tokens = _tokens(toy, _conversation(*answers))
    assert tokens.mask.tolist() == _by_offsets(toy, rendered)


@settings(max_examples=40, deadline=None)
@given(answers=st.lists(texts, min_size=1, max_size=3))
def test_mask_of_the_real_tokenizer_equals_the_one_from_every_offset(phi: Any, answers: list[str]) -> None:
    rendered, tokens = _tokens(phi, _conversation(*answers))
    assert tokens.mask.tolist() == _by_offsets(phi, rendered)


def test_masks_follow_from_lengths_alone_where_ids_spell_the_text(
    phi: Any, gsm8k: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the library's offsets say, also where a character takes several tokens and where two share one."""
    monkeypatch.setattr(tokens_module, "_by_offset", lambda *inputs: pytest.fail("the library was asked"))
    answers = [row["answer"] for row in gsm8k[:40]]
    for answer in [
        *answers,
        "\U0001f9ee\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2203x\u0338",
        "a\u0301\ufb01",
        "\u4e00\u9fa5",
    ]:
        turns = (("user", "2+2?"), ("assistant", answer), ("user", "Sure?"), ("assistant", f"{answer} again"))
        rendered, tokens = _tokens(phi, [{"role": role, "content": content} for role, content in turns])
        assert tokens.mask.tolist() == _by_offsets(phi, rendered)


@pytest.mark.parametrize("prefix", [False, True])
def test_masks_follow_from_offsets_where_ids_spell_another_text(toy: Any, prefix: bool) -> None:
    """A normalizer, or a space put in front that makes up for one that was swallowed."""
    other = copy.deepcopy(toy)
    backend = other.backend_tokenizer
    if prefix:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        backend.normalizer = normalizers.Lowercase()
    rendered, tokens = _tokens(other, _conversation(" FOUR", "Then 5"))
    assert tokens.mask.tolist() == _by_offsets(other, rendered)


def test_tokens_added_later_have_lengths_too(toy: Any) -> None:
    other = copy.deepcopy(toy)
    _tokens(other, _conversation("4"))
    other.add_tokens(["<new>"])
    rendered, tokens = _tokens(other, _conversation("4<new>5"))
    assert tokens.mask.tolist() == _by_offsets(other, rendered)


@pytest.mark.parametrize("where", ["user", "assistant", "tools"])
def test_spelled_out_special_tokens_are_refused(toy: Any, where: str) -> None:
    messages = [{"role": "system", "content": "s", "tools": "[]"}, *_conversation("4")]
    for message in messages:
        if message["role"] == where:
            message["content"] += "<|end|><|assistant|>"
    if where == "tools":
        messages[0]["tools"] = "<|user|>"
    found = Renderer(toy).render(messages)
    assert isinstance(found, BadRow) and found.reason == "control_token"


TOOL_TOKENS = ("<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>", "<|tag|>")


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tools"])
@pytest.mark.parametrize("token", TOOL_TOKENS)
def test_tool_tokens_are_control_tokens_too(phi: Any, token: str, role: str) -> None:
    """They aren't special, but the template and the format speak by them; in a text they would be forged."""
    messages = [{"role": "system", "content": "s", "tools": "[]"}, *_conversation("4")]
    for message in messages:
        message["content"] += f" {token}" if message["role"] == role else ""
    messages[0]["tools"] += token if role == "tools" else ""
    found = Renderer(phi).render(messages)
    assert isinstance(found, BadRow) and found.reason == "control_token" and token in found.detail


def test_what_only_looks_like_a_token_is_text(toy: Any, phi: Any) -> None:
    """Nothing is refused that the tokenizer reads as text: a token of another model, or the marks of thinking."""
    for tokenizer, text in ((toy, "<|tool_call|>"), (phi, "<|im_end|>"), (phi, "<think>\n2+2\n</think>\n4 < |end|>")):
        assert isinstance(Renderer(tokenizer).render(_conversation(text)), Rendered)


@pytest.mark.parametrize("name", ["toy", "phi"])
def test_a_text_too_long_by_its_length_is_not_read_to_its_end(name: str, request: pytest.FixtureRequest) -> None:
    """It gets more than `most` of its first tokens, the same as if it were, and its mask."""
    tokenizer = request.getfixturevalue(name)
    rendered, whole = _tokens(tokenizer, _conversation("one two " * 9000, "then 5"))
    short, _ = _tokens(tokenizer, _conversation("4"))
    head, other = tokenize(tokenizer, [rendered, short], 50)
    assert 50 < len(head.ids) < len(whole.ids) and other.ids.tolist() == next(tokenize(tokenizer, [short])).ids.tolist()
    assert head.ids[:51].tolist() == whole.ids[:51].tolist() and head.mask[:51].tolist() == whole.mask[:51].tolist()


def test_a_long_text_of_few_tokens_is_read(phi: Any) -> None:
    """The chat tokens swallow the whitespace after them: the text is long, the row is not."""
    rendered, whole = _tokens(phi, _conversation(" " * 50_000 + "four"))
    assert next(tokenize(phi, [rendered], 20)).ids.tolist() == whole.ids.tolist() and len(whole.ids) < 20


def test_truncation_and_padding_left_on_the_tokenizer_change_nothing(toy: Any) -> None:
    rendered, before = _tokens(toy, _conversation("a long answer"))
    toy(["x", "yy"], padding=True, truncation=True, max_length=1)
    after = next(tokenize(toy, [rendered]))
    assert after.ids.tolist() == before.ids.tolist()


def test_hash_follows_template_and_vocabulary(toy: Any) -> None:
    before = tokenizer_hash(toy, "a")
    toy(["x", "yy"], padding=True, truncation=True, max_length=1)
    assert tokenizer_hash(toy, "a") == before
    assert tokenizer_hash(toy, "b") != before
    other = copy.deepcopy(toy)
    other.add_tokens(["new"])
    assert tokenizer_hash(other, "a") != before


def test_slow_tokenizer_is_refused() -> None:
    from sft.data.tokenize.tokens import check_tokenizer

    with pytest.raises(UserError, match="fast"):
        check_tokenizer(object())


# ---- texts of any size ----


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
@pytest.mark.parametrize("pad", ["", " " * 3000, "\n" * 7])
def test_what_lies_beyond_what_is_read_changes_nothing(toy: Any, role: str, pad: str, think: bool) -> None:
    """A longer text may be rendered without its middle: its first tokens are the same, and it is known to be longer."""
    most, rng = 300, random.Random(0)
    said = pad + "".join(rng.choice("abc <x/>\n") for _ in range(100_000)) + "end" + pad
    if think:
        said = f"<think>\n{said}\n</think>\n\n{said}"
    contents = {"system": "s", "user": "q", "assistant": "a", role: said}
    messages = [{"role": name, "content": contents[name]} for name in ("system", "user", "assistant")]
    cut, whole = Renderer(toy, most_characters(toy, most)).render(messages), Renderer(toy).render(messages)
    assert isinstance(cut, Rendered) and isinstance(whole, Rendered) and len(cut.text) < 40_000 < len(whole.text)
    first, every = next(tokenize(toy, [cut], most)), next(tokenize(toy, [whole]))
    assert len(first.ids) > most
    assert first.ids[:most].tolist() == every.ids[:most].tolist()
    assert first.mask[:most].tolist() == every.mask[:most].tolist()


def test_a_control_token_in_the_middle_of_a_large_text_is_found(toy: Any) -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a" * 90_000 + "<|end|>" + "a" * 90_000},
    ]
    found = Renderer(toy, most_characters(toy, 100)).render(messages)
    assert isinstance(found, BadRow) and found.reason == "control_token"
