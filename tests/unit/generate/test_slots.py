"""Decoding over slots: what sequences share, when they come and go, and that none of it shows in an answer."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from packed_ops import backend
from sambay_kernels import DecoderStep, DecoderWeights
from tiny_sambay import tiny_model

from sft.generate import Engine, Generation, SamplingParams, slot_batch
from sft.generate.chooser import Chosen
from sft.generate.requests import Request
from sft.generate.slot_batch import SlotBatch
from sft.generate.states import PAGE, States, page_bytes, slot_bytes
from sft.generate.steps import STRIDE
from sft.generate.stops import cut
from sft.models.sambay_decoding import decoder_weights
from sft.utils.errors import UsageError, UserError

ENDS = {3, 5}


class Letters:
    """Token i is a letter or, from 60 on, two."""

    eos_token_id = 0

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(97 + i % 26) * (2 if i >= 60 else 1) for i in ids)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(6, 96, (length,), generator=generator).tolist() for length in lengths]


def answers(model: Any, asked: list[list[int]], params: Any, **options: Any) -> list[Generation]:
    numbers = options.pop("numbers", None)
    options = {"eos_ids": ENDS, **options}
    return Engine(model, Letters(), **options).generate(asked, params, numbers=numbers)


def by_generate(model: Any, prompt: list[int], new: int, **options: Any) -> list[int]:
    """transformers' own loop; what it appends, without an end token."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, eos_token_id=sorted(ENDS),
        pad_token_id=0, **options,
    )  # fmt: skip
    found = out[0, len(prompt) :].tolist()
    return found[:-1] if found[-1] in ENDS else found


LENGTHS = [1, 2, 23, 24, 25, PAGE - 1, PAGE, PAGE + 1, 200, 700, 3000]


@pytest.fixture(scope="module")
def wanted(model: Any) -> list[list[int]]:
    return [by_generate(model, prompt, 60) for prompt in prompts(LENGTHS)]


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 4096), (4, 64), (11, 333), (3, None)])
def test_greedy_is_generate_token_for_token(
    model: Any, wanted: list[list[int]], batch_size: int, chunk: int | None
) -> None:
    params = SamplingParams(max_new_tokens=60)
    found = answers(model, prompts(LENGTHS), params, batch_size=batch_size, prefill_chunk=chunk)
    assert [one.ids for one in found] == wanted
    assert {len(ids) for ids in wanted} != {60}  # some end by themselves


def test_a_prompt_read_a_token_at_a_time(model: Any, wanted: list[list[int]]) -> None:
    found = answers(model, prompts(LENGTHS)[:8], SamplingParams(max_new_tokens=60), batch_size=3, prefill_chunk=1)
    assert [one.ids for one in found] == wanted[:8]


@pytest.mark.parametrize("seed", range(6))
def test_an_answer_is_the_same_bits_whatever_is_beside_it(
    model: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of all kinds, in any order and any company, come and go at random; log-probabilities tell every bit."""
    chance = random.Random(seed)
    asked = prompts([chance.choice([1, 3, 30, 64, 90]) for _ in range(9)], seed)
    asked[4:7] = [asked[3]] * 3
    params = [
        SamplingParams(
            max_new_tokens=chance.randint(1, 90), temperature=chance.choice([0.0, 0.8, 1.5]), seed=index // 2,
            top_p=chance.choice([0.8, 1.0]), top_k=chance.choice([0, 7]), logprobs=3,
            repetition_penalty=chance.choice([1.0, 1.3]), presence_penalty=chance.choice([0.0, 0.5]),
        )
        for index in range(9)
    ]  # fmt: skip
    alone = [answers(model, [p], q, numbers=[n])[0] for n, (p, q) in enumerate(zip(asked, params, strict=True))]
    order = chance.sample(range(9), 9)
    for batch_size, at_once in ((2, 5), (5, 23), (9, 256)):
        monkeypatch.setattr(slot_batch, "READ_AT_ONCE", at_once)
        found = answers(
            model, [asked[i] for i in order], [params[i] for i in order], numbers=order, batch_size=batch_size
        )
        assert found == [alone[i] for i in order]


@pytest.mark.parametrize("name", ["cpp", "torch"])
def test_prompts_read_by_steps_or_by_the_model(
    model: Any, wanted: list[list[int]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of which several are the same, in pieces, where pages run out."""
    asked, want = [[each for each in some[:8] for _ in range(3)] for some in (prompts(LENGTHS), wanted)]
    monkeypatch.setattr(slot_batch, "READ_AT_ONCE", 50)
    sent = few_pages(monkeypatch, 11)
    with backend(name):
        found = answers(model, asked, SamplingParams(max_new_tokens=60), batch_size=8, prefill_chunk=20)
    assert [one.ids for one in found] == want
    assert sent


class Strides:
    """As a GPU decodes: several tokens of every sequence before the host looks."""

    stride = STRIDE

    def __init__(self, step: DecoderStep, states: States) -> None:
        self.step, self.states = step, states

    def __call__(self, rows: list[Request]) -> list[list[Chosen]]:
        tokens, slots = torch.tensor([row.unread[0] for row in rows]), torch.tensor([row.slot for row in rows])
        made = []
        for _ in range(self.stride):
            tokens = self.step(self.states.tensors, tokens, slots).argmax(-1)
            made.append(tokens)
        return [[(token, None) for token in mine] for mine in torch.stack(made, dim=1).tolist()]


def test_steps_that_run_ahead(model: Any, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are read by the model between them; sequences end within a stride, give up their pages and come back."""
    asked, want = [[each for each in some[:8] for _ in range(3)] for some in (prompts(LENGTHS), wanted)]
    monkeypatch.setattr(slot_batch, "steps_for", Strides)
    sent = few_pages(monkeypatch, 11)
    with backend("torch"):
        found = answers(model, asked, SamplingParams(max_new_tokens=60), batch_size=8, prefill_chunk=20)
    assert [one.ids for one in found] == want
    assert sent


def test_samples_of_one_prompt_differ_and_are_those_of_separate_calls(model: Any) -> None:
    prompt, params = prompts([PAGE + 9])[0], SamplingParams(max_new_tokens=40, temperature=1.0)
    together = answers(model, [prompt] * 6, params, batch_size=6)
    assert together == [answers(model, [prompt], params, numbers=[n])[0] for n in range(6)]
    assert len({tuple(one.ids) for one in together}) == 6


@pytest.mark.parametrize("by_steps", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_a_prompt_is_read_once_for_all_its_samples(
    model: Any, batch_size: int, by_steps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    steps: list[int] = []
    forward, step = type(model).forward, DecoderStep.__call__

    def counted(self: Any, input_ids: Any = None, **options: Any) -> Any:
        reads.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **options)

    def counted_step(self: Any, slots: Any, tokens: Any, *more: Any) -> Any:
        steps.append(len(tokens))
        return step(self, slots, tokens, *more)

    monkeypatch.setattr(type(model), "forward", counted)
    monkeypatch.setattr(DecoderStep, "__call__", counted_step)
    params = SamplingParams(max_new_tokens=30, temperature=1.0)
    with backend("cpp" if by_steps else "torch"):
        answers(model, [prompts([70])[0]] * 5, params, batch_size=batch_size, eos_ids=())
    assert reads == ([] if by_steps else [69])
    assert sum(steps) == 5 * 30 + (69 if by_steps else 0)  # each sample reads the prompt's last token


def few_pages(monkeypatch: pytest.MonkeyPatch, pages: int) -> list[int]:
    """So many pages for all; returns how often a sequence was sent back."""
    sent: list[int] = []
    send_back = SlotBatch._send_back

    def states(weights: DecoderWeights, slots: int, longest: int) -> States:
        return States(weights, slots=slots, longest=longest, pages=pages)

    def counted(self: SlotBatch, queue: Any) -> None:
        sent.append(len(self.rows))
        send_back(self, queue)

    monkeypatch.setattr(slot_batch, "_states", states)
    monkeypatch.setattr(SlotBatch, "_send_back", counted)
    return sent


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_without_pages_for_all_some_wait_and_read_again(
    model: Any, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: what was said is read again as it was read before."""
    asked, params = (
        prompts([10, 50, 60, 63, 64, 100]),
        SamplingParams(max_new_tokens=130, temperature=temperature, logprobs=2),
    )
    want = answers(model, asked, params, batch_size=6, eos_ids=())
    sent = few_pages(monkeypatch, 2 * -(-(100 + 130 + 16) // PAGE) + 1)
    found = answers(model, asked, params, batch_size=6, eos_ids=())
    assert sent
    assert found == want


def test_samples_without_pages_for_all(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [prompt for prompt in prompts([100, 64, 1]) for _ in range(4)]
    params = SamplingParams(max_new_tokens=90, temperature=1.0, logprobs=2)
    want = [answers(model, [prompt], params, numbers=[n], eos_ids=())[0] for n, prompt in enumerate(asked)]
    sent = few_pages(monkeypatch, 2 * -(-(100 + 90 + 16) // PAGE) + 1)
    assert answers(model, asked, params, batch_size=6, eos_ids=()) == want
    assert sent


def test_too_little_memory_for_one_sequence_is_said_before_anything_is_made(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = decoder_weights(model)
    assert weights is not None
    monkeypatch.setattr(slot_batch, "free_bytes", lambda device: 4 * page_bytes(weights))
    with pytest.raises(UserError, match="lower max_new_tokens"):
        answers(model, prompts([70]), SamplingParams(max_new_tokens=70))


def test_with_memory_for_few_sequences_the_others_wait(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, params = decoder_weights(model), SamplingParams(max_new_tokens=20, temperature=1.0)
    assert weights is not None
    want = answers(model, prompts([5, 9, 30, 40, 7]), params)
    room = 4 * slot_bytes(weights) + 9 * page_bytes(weights)  # two of slots are nobody's and the prompt's
    monkeypatch.setattr(slot_batch, "free_bytes", lambda device: room / slot_batch._SHARE_OF_MEMORY)
    batch = Engine(model, Letters(), eos_ids=ENDS).batch(60)
    assert isinstance(batch, SlotBatch) and 1 <= len(batch.states._free_slots) < 5
    assert answers(model, prompts([5, 9, 30, 40, 7]), params) == want


def test_slots_and_pages_are_all_given_back(model: Any) -> None:
    engine = Engine(model, Letters(), eos_ids=ENDS, batch_size=3)
    batch = engine.batch(200)
    assert isinstance(batch, SlotBatch)
    free = (len(batch.states._free_slots), len(batch.states._free_pages))
    asked = prompts([5, 70, 70, 130])
    asked[2] = asked[1]
    queue = deque(engine.request(i, i, p, SamplingParams(max_new_tokens=60)) for i, p in enumerate(asked))
    while queue or batch.rows:
        batch.step(queue)
    assert (len(batch.states._free_slots), len(batch.states._free_pages)) == free
    assert not any(batch.states._users)


def test_repetition_penalty_is_that_of_transformers(model: Any) -> None:
    for prompt in prompts([4, 40]):
        found = answers(model, [prompt], SamplingParams(max_new_tokens=40, repetition_penalty=1.4))[0]
        assert found.ids == by_generate(model, prompt, 40, repetition_penalty=1.4)


def test_presence_penalty_counts_the_answer_alone(model: Any) -> None:
    prompt = prompts([30])[0]
    found = answers(model, [prompt], SamplingParams(max_new_tokens=60, presence_penalty=1e9))[0].ids
    assert len(set(found)) == len(found) > 0 and set(found) & set(prompt)


def test_penalties_arent_taken_for_broken_weights(model: Any) -> None:
    params = SamplingParams(max_new_tokens=5, presence_penalty=-1e300)
    with pytest.raises(UserError, match="With their penalties the logits are not finite"):
        answers(model, prompts([9]), params)
    broken = tiny_model()
    with torch.no_grad():
        broken.model.embed_tokens.weight[20] = float("nan")
    with pytest.raises(UserError, match="its weights are broken"):
        answers(broken, [[20, 8]], params)
    extremes = [SamplingParams(max_new_tokens=5, repetition_penalty=penalty) for penalty in (0.01, 100)]
    assert all(one.ids for one in answers(model, prompts([9, 9]), extremes, eos_ids=()))


@torch.no_grad()
def test_log_probabilities_are_the_models(model: Any) -> None:
    prompt = prompts([20])[0]
    found = answers(model, [prompt], SamplingParams(max_new_tokens=25, temperature=0.7, logprobs=4))[0]
    assert found.logprobs is not None and len(found.logprobs) == len(found.ids)
    whole = model(input_ids=torch.tensor([prompt + found.ids])).logits[0].double().log_softmax(-1)
    for place, (token, told) in enumerate(zip(found.ids, found.logprobs, strict=True), len(prompt) - 1):
        assert abs(whole[place, token] - told.token) < 1e-4
        values, ids = whole[place].topk(4)
        assert list(told.top) == ids.tolist()
        assert torch.allclose(torch.tensor(list(told.top.values())).double(), values, atol=1e-4)


def test_a_stop_text_ends_the_answer_wherever_tokens_cut_it(model: Any) -> None:
    prompt = prompts([12])[0]
    whole = answers(model, [prompt], SamplingParams(max_new_tokens=60, temperature=1.0))[0]
    text = Letters().decode(whole.ids)
    for begin in (3, 10, 21):
        stop = text[begin : begin + 3]
        params = SamplingParams(max_new_tokens=60, temperature=1.0, stop=("never so", stop))
        found = answers(model, [prompt], params)[0]
        assert (found.stop, found.finish_reason) == (stop, "stop")
        assert found.ids == whole.ids[: len(found.ids)]
        assert stop in Letters().decode(found.ids) and stop not in Letters().decode(found.ids[:-1])
        assert cut(Letters().decode(found.ids), found.stop) == text[: text.index(stop)]


def test_a_stop_token_of_the_request_ends_it(model: Any) -> None:
    prompt = prompts([12])[0]
    whole = answers(model, [prompt], SamplingParams(max_new_tokens=30))[0].ids
    found = answers(model, [prompt], SamplingParams(max_new_tokens=30, stop_token_ids=frozenset({whole[7]})))[0]
    assert found == Generation(whole[: whole.index(whole[7])], True)


# ---- what is asked, in any form ----


def test_a_text_is_one_stop_text_and_collections_are_taken(model: Any) -> None:
    prompt = prompts([12])[0]
    text = Letters().decode(answers(model, [prompt], SamplingParams(max_new_tokens=60, temperature=1.0))[0].ids)
    stop = text[10:13]
    want = SamplingParams(max_new_tokens=60, temperature=1.0, stop=(stop,), stop_token_ids=frozenset({3}), top_k=0)
    assert (found := answers(model, [prompt], want)[0]).stop == stop
    others: list[dict[str, Any]] = [
        {"stop": stop, "stop_token_ids": [3], "top_k": -1},
        {"stop": [stop], "stop_token_ids": {3}, "top_k": np.int64(0)},
        {"stop": {stop}, "stop_token_ids": np.array([3]), "top_k": 2**40},
    ]
    for other in others:
        params = SamplingParams(max_new_tokens=60, temperature=np.float32(1), **other)
        assert answers(model, [prompt], params)[0] == found
        assert hash(params) == hash(want) or other["top_k"] > 0
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("top_k", 2.5, "a whole number, not 2.5"),
        ("top_k", -2, "at least 0, not -2"),
        ("max_new_tokens", 4.5, "a whole number, not 4.5"),
        ("max_new_tokens", None, "a whole number, not None"),
        ("max_length", "9", "a whole number, not '9'"),
        ("logprobs", True, "a whole number, not True"),
        ("seed", "a", "a whole number, not 'a'"),
        ("seed", None, "a whole number, not None"),
        ("temperature", True, "a number, not True"),
        ("temperature", float("nan"), "at least 0, not nan"),
        ("top_p", "0.9", "a number, not '0.9'"),
        ("repetition_penalty", 1e-300, "from 0.01 to 100, not 1e-300"),
        ("repetition_penalty", 101, "from 0.01 to 100, not 101"),
        ("stop", (3,), r"texts that aren't empty, not \(3,\)"),
        ("stop", 3, "texts that aren't empty, not 3"),
        ("stop", "", "texts that aren't empty, not ''"),
        ("stop", b"ab", "texts that aren't empty, not b'ab'"),
        ("stop_token_ids", "5", "token ids, not '5'"),
        ("stop_token_ids", 5, "token ids, not 5"),
        ("stop_token_ids", [5.0], r"token ids, not \[5.0\]"),
    ],
)
def test_values_that_mean_nothing_are_told_at_once(name: str, value: Any, told: str) -> None:
    with pytest.raises(UsageError, match=f"^{name} must be {told}$"):
        SamplingParams(**{name: value})


def test_prompts_are_rows_of_ids_of_any_kind(model: Any) -> None:
    asked, params = prompts([9, 9]), SamplingParams(max_new_tokens=6)
    want = answers(model, asked, params)
    rows: list[Any] = [
        torch.tensor(asked),
        np.array(asked),
        [torch.tensor(row) for row in asked],
        [np.array(row) for row in asked],
        tuple(map(tuple, asked)),
        [list(np.array(row)) for row in asked],
    ]
    for row in rows:
        assert answers(model, row, params) == want


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["hello"], "Prompt 0 must be a row of token ids, .* not 'hello'"),
        ("hello", "Prompt 0 must be a row of token ids, .* not 'h'"),
        ([7, 8], "Prompt 0 must be a row of token ids, .* not 7"),
        (torch.tensor([7, 8]), r"Prompt 0 must be a row of token ids, .* not tensor\(7\)"),
        ([[7], [7.0]], r"Prompt 1 must be a row of token ids, .* not \[7.0\]"),
        ([[True]], r"not \[True\]"),
        ([[[7]]], r"not \[\[7\]\]"),
        ([torch.tensor([])[None]], "Prompt 0 must be a row of token ids"),
        ([torch.tensor([], dtype=torch.long)], "Prompt 0 has no tokens"),
    ],
)
def test_what_isnt_token_ids_is_told(model: Any, asked: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        answers(model, asked, SamplingParams(max_new_tokens=3))


@pytest.mark.parametrize("token", [-5, 96, 10**6, 1 << 70])
def test_ids_that_arent_the_models_are_told(model: Any, token: int) -> None:
    with pytest.raises(UserError, match=rf"^Prompt 1: token {token} isn't in the vocabulary \(0 to 95\) of the model"):
        answers(model, [[7], [9, token, 8]], SamplingParams(max_new_tokens=3))
