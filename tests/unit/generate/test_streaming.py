"""Answers that come piece by piece: their text, their thinking, and an engine that many ask."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_toys import toy, toy_engine

from sft.generate import Engine, SamplingParams
from sft.generate.stops import cut
from sft.generate.streaming import STOPPED, AsyncEngine, Piece, stream
from sft.generate.text import TextStream, Thinking
from sft.tokenizers.tiny import build_tokenizer
from sft.utils.errors import UserError

TOKENIZER = build_tokenizer()
WORDS = ["sum", "+ 4", " = ", "été", "日本", "🙂", "\n", "<think>", "</think>", "END", "EN", "x"]


def cuts(draw: Any, ids: list[int]) -> list[list[int]]:
    """The ids in pieces of any lengths."""
    pieces = []
    while ids:
        size = draw(st.integers(1, 5))
        pieces.append(ids[:size])
        ids = ids[size:]
    return pieces


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_text_of_pieces_is_the_text_of_all(data: st.DataObject) -> None:
    """Of texts, and of any tokens: parts of characters, special tokens."""
    if data.draw(st.booleans()):
        ids = TOKENIZER("".join(data.draw(st.lists(st.sampled_from(WORDS), max_size=12))))["input_ids"]
    else:
        ids = data.draw(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=30))
    text, said = TextStream(TOKENIZER, ("END",)), ""
    pieces = cuts(data.draw, ids)
    for piece in pieces:
        said += text.add(piece)
        assert TOKENIZER.decode(ids, skip_special_tokens=True).startswith(said)
    assert said + text.finish([]) == TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_nothing_of_a_stop_text_is_ever_shown(data: st.DataObject) -> None:
    before = "".join(data.draw(st.lists(st.sampled_from([word for word in WORDS if word != "END"]), max_size=8)))
    if "END" in before + "EN":
        return
    ids = TOKENIZER(f"{before}END and more")["input_ids"]
    last = next(n for n in range(1, len(ids) + 1) if "END" in TOKENIZER.decode(ids[:n]))
    text, said = TextStream(TOKENIZER, ("END", "ENDED")), ""
    *pieces, end = cuts(data.draw, ids[:last])
    for piece in pieces:
        said += text.add(piece)
    assert said + text.finish(end, "END") == cut(TOKENIZER.decode(ids[:last]), "END") == before


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_thinking_is_told_from_the_answer_however_it_is_cut(data: st.DataObject) -> None:
    lead, thought = data.draw(st.sampled_from(["", "\n", " "])), data.draw(st.sampled_from(["", "a < b", "\n1 </thin"]))
    answer = data.draw(st.sampled_from(["", "\n\n4", "<think> again </think>"]))
    opened, closed = data.draw(st.booleans()), data.draw(st.booleans())
    whole = f"{'' if opened else f'{lead}<think>'}{thought}" + (f"</think>{answer}" if closed else "")
    thinking, parts = Thinking(opened=opened), []
    while whole:
        size = data.draw(st.integers(1, 9))
        parts += thinking.add(whole[:size])
        whole = whole[size:]
    parts += thinking.finish()
    joined = {kind: "".join(text for one, text in parts if one == kind) for kind in ("thought", "answer")}
    assert joined == {"thought": thought, "answer": answer if closed else ""}


@pytest.mark.parametrize("text", ["<b>4</b>", "  4", "<thin", "<thinking>", ""])
def test_an_answer_without_thinking_is_all_answer(text: str) -> None:
    thinking = Thinking()
    parts = [part for letter in text for part in thinking.add(letter)] + thinking.finish()
    assert "".join(part for kind, part in parts if kind == "answer") == text


# ---- the engine ----


def prompt(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text)["input_ids"]
    return ids


def engine_of(family: str, batch_size: int) -> Engine:
    """An engine over slots, or over a model's own cache."""
    engine = toy_engine(batch_size)
    if family == "own cache":
        engine._step = None
    return engine


def test_a_stream_is_the_answer() -> None:
    engine = toy_engine()
    params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=3, logprobs=2)
    pieces = list(stream(engine, prompt("2 + 2?"), params))
    [whole] = engine.generate([prompt("2 + 2?")], params)
    assert [token for piece in pieces for token in piece.ids] == whole.ids
    assert [one for piece in pieces for one in piece.logprobs] == whole.logprobs
    assert pieces[-1].end == whole and len(pieces) > 3


async def gathered(answers: Any) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in answers.requests]
    ends: list[Piece] = []
    with answers:
        async with asyncio.timeout(60):
            async for position, piece in answers.pieces():
                found[position] += piece.ids
                ends += [piece] if piece.end is not None else []
    assert len(ends) == len(found)
    return found


@pytest.fixture
def sent_back(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Room for ten pages; how often a sequence had to give up its own."""
    from sft.generate.slot_batch import SlotBatch

    times, send_back = [], SlotBatch._send_back

    def counted(self: SlotBatch, queue: Any) -> None:
        times.append(len(self.rows))
        send_back(self, queue)

    monkeypatch.setattr(SlotBatch, "_send_back", counted)
    monkeypatch.setattr("sft.generate.slot_batch.page_bytes", lambda weights: 1)
    monkeypatch.setattr("sft.generate.slot_batch.slot_bytes", lambda weights: 1)
    monkeypatch.setattr("sft.generate.slot_batch.free_bytes", lambda device: 27)
    return times


def test_nothing_is_lost_where_sequences_give_up_their_pages(sent_back: list[int]) -> None:
    check_crowd("slots", tokens=12, longest=200, batch_size=8)
    assert sent_back


@pytest.mark.parametrize("family", ["slots", "own cache"])
def test_answers_dont_depend_on_who_else_asks_and_leaves(family: str) -> None:
    check_crowd(family, tokens=3, longest=64)


def check_crowd(family: str, *, tokens: int, longest: int, batch_size: int = 3) -> None:
    """Askers come and leave at random; every answer is the one that its request gets alone, and nothing is kept."""
    asked = [
        (prompt(f"{i} + {i}?"), SamplingParams(max_new_tokens=4 + tokens * i, temperature=float(i % 2), seed=i))
        for i in range(12)
    ]
    alone = [engine_of(family, 1).generate([ids], params)[0].ids for ids, params in asked]
    front = AsyncEngine(engine_of(family, batch_size), longest=longest)

    async def leaver(seed: int) -> None:
        chance = random.Random(seed)
        await asyncio.sleep(chance.random() / 20)
        with front.submit([(prompt(f"{seed}?"), 0)] * 2, [SamplingParams(max_new_tokens=50)] * 2) as answers:
            async for _ in answers.pieces():
                if chance.random() < 0.3:
                    return

    async def asker(number: int) -> list[list[int]]:
        await asyncio.sleep(random.Random(number).random() / 20)
        ids, params = asked[number]
        return await gathered(front.submit([(ids, 0), (ids, 1)], [params, params]))

    async def everybody() -> list[list[list[int]]]:
        leaving = asyncio.gather(*map(leaver, range(10)))
        found = await asyncio.gather(*map(asker, range(len(asked))))
        await leaving
        for _ in range(3000):
            if not (front._owner or front._batch.rows or front._queue):
                break
            await asyncio.sleep(0.01)
        return found

    found = asyncio.run(everybody())
    assert [first for first, _ in found] == alone
    assert (front.pending, front.live, front.pages[0], front._owner) == (0, 0, 0, {})
    assert front.close()


def test_a_failure_is_told_to_those_under_way_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    front = AsyncEngine(toy_engine(), longest=64)
    step, failing = type(front._batch).step, [True]

    def fails(self: Any, queue: Any) -> Any:
        if failing and self.rows:
            failing.pop()
            raise RuntimeError("out of luck")
        return step(self, queue)

    monkeypatch.setattr(type(front._batch), "step", fails)

    async def ask() -> list[list[int]]:
        return await gathered(front.submit([(prompt("1?"), 0)], [SamplingParams(max_new_tokens=5)]))

    async def twice() -> int:
        with pytest.raises(RuntimeError, match="out of luck"):
            await ask()
        return len((await ask())[0])

    assert asyncio.run(twice()) == 5
    assert front.close()


def test_an_engine_that_was_closed_says_so() -> None:
    front = AsyncEngine(toy_engine(), longest=4000)

    async def ask() -> None:
        answers = front.submit([(prompt("1?"), 0)], [SamplingParams(max_new_tokens=3900)])
        closing = asyncio.create_task(asyncio.to_thread(front.close))
        with pytest.raises(UserError, match=STOPPED):
            await gathered(answers)
        assert await closing
        with pytest.raises(UserError, match=STOPPED):
            front.submit([(prompt("1?"), 0)], [SamplingParams(max_new_tokens=1)])

    asyncio.run(ask())


def test_what_can_never_be_answered_is_refused_at_once() -> None:
    front = AsyncEngine(toy_engine(), longest=16)

    async def ask(ids: list[int], most: int) -> None:
        front.submit([(ids, 0)], [SamplingParams(max_new_tokens=most)])

    with pytest.raises(ValueError, match="of at most 16"):
        asyncio.run(ask([1] * 10, 7))
    with pytest.raises(UserError, match="isn't in the vocabulary"):
        asyncio.run(ask([toy()[0].config.vocab_size], 1))
    assert front.close()
