"""What a server answers, by the official client: the same as the engine, whole and in pieces."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from serving_toys import NAME, Running, chat, running, toy, toy_engine

from sft.generate import Generation, SamplingParams
from sft.generate.stops import cut
from sft.tokenizers.prompt import prompt_text

SAMPLED = {"temperature": 1.0, "seed": 7, "max_tokens": 12}


def engine_says(text: str, number: int = 0, **params: Any) -> Generation:
    """What the engine answers to a chat, alone."""
    _, tokenizer = toy()
    rendered = prompt_text(tokenizer, [{"role": "user", "content": text}])
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 7, **params}
    return toy_engine(1).generate([ids], SamplingParams(**options), numbers=[number])[0]


def text_of(generation: Generation) -> str:
    return cut(toy()[1].decode(generation.ids, skip_special_tokens=True), generation.stop)


def asked(server: Running, text: str = "2 + 2?", **fields: Any) -> Any:
    return server.client().chat.completions.create(**chat(text, **fields))


def put_together(chunks: Any) -> tuple[dict[int, str], dict[int, str], Any]:
    """(text, reason to end) by choice, and the usage, of a stream."""
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    usage = None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                assert choice.index not in ends
                ends[choice.index] = choice.finish_reason
    return texts, ends, usage


def test_a_chat_is_answered_as_the_engine_answers(server: Running) -> None:
    greedy = asked(server, temperature=0, max_tokens=12)
    assert greedy.choices[0].message.content == text_of(engine_says("2 + 2?", temperature=0.0))
    made = asked(server, **SAMPLED, n=3)
    expected = [engine_says("2 + 2?", number) for number in range(3)]
    assert [choice.message.content for choice in made.choices] == [text_of(one) for one in expected]
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    assert [choice.finish_reason for choice in made.choices] == [one.finish_reason for one in expected]
    assert made.usage.completion_tokens == sum(len(one.ids) for one in expected)
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
    assert made.model == NAME and made.object == "chat.completion" and made.id.startswith("chatcmpl-")


def test_a_stream_comes_to_the_same(server: Running) -> None:
    whole = asked(server, **SAMPLED, n=2)
    texts, ends, usage = put_together(
        asked(server, **SAMPLED, n=2, stream=True, stream_options={"include_usage": True})
    )
    assert [texts[0], texts[1]] == [choice.message.content for choice in whole.choices]
    assert [ends[0], ends[1]] == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    assert put_together(asked(server, **SAMPLED, stream=True))[2] is None


def test_without_a_seed_answers_differ(server: Running) -> None:
    assert len({asked(server, max_tokens=16).choices[0].message.content for _ in range(3)}) == 3


def test_a_stop_text_ends_an_answer_and_is_never_shown(server: Running) -> None:
    whole = asked(server, temperature=0, max_tokens=12).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    for stops in (stop, ["nowhere", stop]):
        made = asked(server, temperature=0, max_tokens=12, stop=stops).choices[0]
        assert (made.message.content, made.finish_reason) == (whole.partition(stop)[0], "stop")
        texts, ends, _ = put_together(asked(server, temperature=0, max_tokens=12, stop=stops, stream=True))
        assert (texts[0], ends[0]) == (whole.partition(stop)[0], "stop")


def test_log_probabilities_are_the_engines(server: Running) -> None:
    expected = engine_says("2 + 2?", logprobs=3)
    made = asked(server, **SAMPLED, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert expected.logprobs is not None and len(made) == len(expected.ids)
    for one, of in zip(made, expected.logprobs, strict=True):
        assert one.logprob == pytest.approx(of.token)
        assert [other.logprob for other in one.top_logprobs] == pytest.approx(list(of.top.values()))
    raw = b"".join(bytes(one.bytes) for one in made)
    assert raw.decode(errors="replace") == toy()[1].decode(expected.ids)
    streamed = [
        one
        for chunk in asked(server, **SAMPLED, logprobs=True, top_logprobs=3, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for one in choice.logprobs.content
    ]
    assert streamed == made
    assert len(asked(server, **SAMPLED, logprobs=True).choices[0].logprobs.content[0].top_logprobs) == 0


def test_vllms_own_fields_have_their_effect(server: Running) -> None:
    for name, value in (("top_k", 1), ("min_p", 1.0)):
        made = asked(server, **{**SAMPLED, "extra_body": {name: value}}).choices[0].message.content
        assert made == text_of(engine_says("2 + 2?", temperature=0.0)), name
    for name, value in (("repetition_penalty", 3.0), ("presence_penalty", 2.0)):
        made = asked(server, temperature=0, max_tokens=12, extra_body={name: value}).choices[0].message.content
        assert made == text_of(engine_says("2 + 2?", temperature=0.0, **{name: value})), name
    first = engine_says("2 + 2?", temperature=0.0).ids[0]
    made = asked(server, temperature=0, extra_body={"stop_token_ids": [first]})
    assert (made.choices[0].message.content, made.choices[0].finish_reason) == ("", "stop")


def test_texts_and_ids_are_completed(server: Running) -> None:
    tokenizer, client = toy()[1], server.client()
    ids = [tokenizer(text)["input_ids"] for text in ("1 + 1", "say")]
    expected = toy_engine(1).generate(ids, SamplingParams(max_new_tokens=16, logprobs=1))
    for prompt in (["1 + 1", "say"], ids):
        made = client.completions.create(model=NAME, prompt=prompt, temperature=0, logprobs=1)
        assert [choice.text for choice in made.choices] == [text_of(one) for one in expected]
        for choice, one in zip(made.choices, expected, strict=True):
            assert one.logprobs is not None
            assert choice.logprobs.token_logprobs == pytest.approx([of.token for of in one.logprobs])
            assert choice.logprobs.text_offset[:2] == [0, len(choice.logprobs.tokens[0])]
    streamed = client.completions.create(model=NAME, prompt="1 + 1", temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text_of(expected[0])


@pytest.mark.parametrize("likeliest", [0, 2])
def test_a_token_of_a_text_is_told_beside_the_likeliest(server: Running, likeliest: int) -> None:
    tokenizer, client = toy()[1], server.client()
    params = SamplingParams(max_new_tokens=12, temperature=2.0, seed=7, logprobs=likeliest)
    [one] = toy_engine(1).generate([tokenizer("1 + 1")["input_ids"]], params)
    assert one.logprobs is not None
    assert any(token not in of.top for token, of in zip(one.ids, one.logprobs, strict=True))
    made = client.completions.create(
        model=NAME, prompt="1 + 1", temperature=2.0, seed=7, max_tokens=12, logprobs=likeliest
    ).choices[0]
    told = made.logprobs
    for token, top, own, of in zip(told.tokens, told.top_logprobs, told.token_logprobs, one.logprobs, strict=True):
        assert top[token] == own == pytest.approx(of.token)
        assert sorted(top.values())[-max(1, likeliest) :] == pytest.approx(sorted(of.top.values()) or [own])
        assert likeliest <= len(top) <= likeliest + 1


def test_an_answer_is_the_same_in_a_crowd(server: Running) -> None:
    texts = [f"{i} + {i + 1}?" for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        made = list(pool.map(lambda text: asked(server, text, **SAMPLED).choices[0].message.content, texts))
    assert made == [text_of(engine_says(text)) for text in texts]


def test_what_the_server_has_is_told(server: Running) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).max_model_len == 256
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_messages_may_come_back_and_in_parts(server: Running) -> None:
    first = asked(server, temperature=0)
    parts = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]
    assert asked(server, parts, temperature=0).choices[0].message.content == first.choices[0].message.content
    messages = [{"role": "developer", "content": "Be brief."}, *chat()["messages"], first.choices[0].message]
    more = server.client().chat.completions.create(
        **{**chat(), "messages": [*messages, {"role": "user", "content": "3 + 3?"}]}
    )
    assert more.usage.prompt_tokens > first.usage.prompt_tokens


# ---- thinking ----


@pytest.mark.parametrize(("separate", "include"), [(True, None), (True, False), (False, None)])
def test_thinking_goes_where_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch, separate: bool, include: bool | None
) -> None:
    """A model that is made to say this."""
    said = "<think>\n2 and 2</think>\n\n4 <think>"
    ids = toy()[1](said)["input_ids"]
    take = _scripted(ids)
    monkeypatch.setattr("sft.generate.requests.Request.take", take)
    fields: dict[str, Any] = {"max_tokens": len(ids)}
    if include is not None:
        fields["extra_body"] = {"include_reasoning": include}
    expected = ("\n2 and 2" if include is None else None, "\n\n4 <think>") if separate else (None, said)
    with running(separate_thinking=separate) as server:
        message = asked(server, **fields).choices[0].message
        assert (getattr(message, "reasoning_content", None), message.content) == expected
        deltas = [chunk.choices[0].delta for chunk in asked(server, **fields, stream=True)]
        thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        assert (thought or None, "".join(delta.content or "" for delta in deltas)) == expected


def _scripted(ids: list[int]) -> Any:
    from sft.generate.requests import Request

    take = Request.take
    return lambda self, token, logprobs=None: take(self, ids[len(self.ids)], logprobs)


def test_metrics_count(server: Running) -> None:
    from http_client import httpx

    def values() -> dict[str, float]:
        response = httpx.get(f"{server.url}/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = [line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    before = values()
    made = asked(server, **SAMPLED, n=2)
    after = values()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown['sft_requests_total{path="/v1/chat/completions",status="200"}'] == 1
    assert grown["sft_answer_tokens_total"] == made.usage.completion_tokens
    assert grown["sft_prompt_tokens_total"] == made.usage.prompt_tokens
    assert grown["sft_time_to_first_token_seconds_count"] == 2
    assert after['sft_time_to_first_token_seconds_bucket{le="+Inf"}'] == after["sft_time_to_first_token_seconds_count"]
    assert after["sft_slots"] == 4 and after["sft_slots_used"] == 0 and math.isfinite(after["sft_pages"])
