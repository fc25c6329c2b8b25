"""The benchmark of answers: all sides do the same work, and figures are what they are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import pytest
import torch
from sambay_kernels import AttentionWeights, DecoderStep
from tiny_sambay import tiny_model
from transformers.cache_utils import DynamicLayer

from sft.generate.bench import answers, steps
from sft.generate.bench.answers import measure_answers
from sft.generate.bench.curves import Curve, Curves, Fit, curve_rows, fits, straight, whole, whole_rows
from sft.generate.bench.peak import Peak
from sft.generate.bench.rows import ENGINE, INNER, LLAMA, OWN
from sft.generate.bench.sides import by_engine, by_generate
from sft.generate.bench.workloads import WORKLOADS, Workload, even, grid, uneven
from sft.generate.cache import cache_keyword
from sft.models.sambay_decoding import decoder_weights
from sft.models.sized import transformer_beside
from sft.utils.errors import UsageError


def quiet(done: int, total: int) -> None:
    assert 1 <= done <= total


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def llama(model: Any) -> Any:
    return transformer_beside(model).eval()


# ---- workloads and sides ----


def test_workloads_are_what_they_are_called() -> None:
    lengths = {name: (len(one.prompts), max(one.prompts), max(one.answers)) for name, one in WORKLOADS.items()}
    assert lengths.pop("uneven")[0] == 64
    assert lengths == {
        "short": (16, 128, 256),
        "long-answer": (1, 512, 1024),
        "long-prompt": (1, 4096, 64),
        "long-both": (8, 2048, 2048),
    }
    mixed = WORKLOADS["uneven"]
    for some in (mixed.prompts, mixed.answers):
        assert len(set(some)) > 40 and 32 <= min(some) < 64 and 1024 < max(some) <= 2048
    assert [one.what for one in grid([1, 2], [3], [4, 5])] == [
        f"{requests} x (3 + {new})" for requests in (1, 2) for new in (4, 5)
    ]
    texts = mixed.texts(96, 0)
    assert tuple(map(len, texts)) == mixed.prompts and texts == mixed.texts(96, 0) != mixed.texts(96, 1)
    assert {token for text in texts for token in text} == set(range(1, 96))


@pytest.mark.parametrize("make", [by_engine, by_generate])
def test_answers_have_all_their_tokens_whatever_ends_one(make: Callable[[Any], Any]) -> None:
    """Every token is an end token of this model."""
    model = tiny_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = list(range(96))
    work = uneven(5, 3, 20)
    moments = make(model)(work.texts(96, 0), work.answers)
    assert [len(one) for one in moments] == list(work.answers)
    assert all(one[0] > 0 and one == sorted(one) for one in moments)


def test_generate_takes_batches_one_after_another(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft.generate.bench.sides.MOST_AT_ONCE", 2)
    work = Workload("", (3, 9, 5), (2, 4, 3))
    moments = by_generate(model)(work.texts(96, 0), work.answers)
    assert [len(one) for one in moments] == [2, 4, 3]
    assert moments[0] == moments[1][:2] and moments[2][0] > moments[1][-1]


# ---- whole answers ----


def test_a_row_for_each_workload_and_side(model: Any, llama: Any) -> None:
    models = {ENGINE: model, OWN: model, LLAMA: llama}
    works = [even(2, 5, 20), even(1, 3, 1)]
    rows = measure_answers(models, works, rounds=2, seed=0, tick=quiet)
    assert [(row.what, row.side) for row in rows] == [(work.what, side) for work in works for side in models]
    for row in rows:
        new = 20 if row.requests == 2 else 1
        assert row.seconds == min(row.rounds) and len(row.rounds) == 2
        assert row.tokens_per_second == pytest.approx(row.requests * new / row.seconds)
        assert 0 < row.first_token <= row.seconds and (row.token is None) == (new == 1) == (row.growth is None)
        assert (row.times is None) == (row.side == ENGINE)
    assert rows[2].times == pytest.approx(rows[0].tokens_per_second / rows[2].tokens_per_second)


def fake(paces: Sequence[float]) -> Any:
    """A side whose tokens come at these distances, one for each call: the first call warms up."""
    calls = count()

    def complete(prompts: Any, counts: Sequence[int]) -> list[list[float]]:
        step = paces[next(calls)]
        return [[step * (place + 1) for place in range(many)] for many in counts]

    return complete


def measured(monkeypatch: pytest.MonkeyPatch, model: Any, complete: Any) -> answers.Row:
    monkeypatch.setattr(answers, "by_engine", lambda model: complete)
    (row,) = measure_answers({ENGINE: model}, [even(2, 4, 40)], rounds=3, seed=0, tick=quiet)
    return row


def test_the_fastest_round_counts(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    row = measured(monkeypatch, model, fake([0.001, 0.3, 0.1, 0.2]))
    assert row.rounds == pytest.approx((12, 4, 8)) and row.seconds == pytest.approx(4)
    assert (row.tokens_per_second, row.first_token, row.token) == pytest.approx((20, 0.1, 0.1))
    assert row.growth == pytest.approx(1)


def test_a_side_that_cheats_or_has_no_memory(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    with pytest.raises(RuntimeError, match="as many tokens"):
        measured(monkeypatch, model, lambda prompts, counts: [[0.1]] * len(counts))

    def full(prompts: Any, counts: Any) -> Any:
        raise torch.OutOfMemoryError

    row = measured(monkeypatch, model, full)
    assert row.full and row.seconds is None and row.tokens_per_second is None


def test_growth_is_the_last_quarter_over_the_first() -> None:
    gaps = [1.0] * 11 + [2.0] * 19 + [3.0] * 10
    moments = [sum(gaps[: place + 1]) for place in range(40)]
    assert answers.growth(moments) == pytest.approx(3)
    assert answers.growth([5.0] * 30 + [6.0] * 10) is None  # a GPU's tokens come several at once


def test_peak_sees_what_is_freed_again() -> None:
    with Peak(torch.device("cpu")) as peak:
        torch.ones(8 << 20)
    assert 24 << 20 < peak.bytes < 64 << 20
    with Peak(torch.device("cpu")) as peak:
        torch.ones(8)
    assert 0 <= peak.bytes < 24 << 20


# ---- steps at a length ----


@pytest.mark.parametrize("requests", [1, 3])
def test_steps_have_the_tokens_before_them_that_are_asked_for(model: Any, llama: Any, requests: int) -> None:
    weights = decoder_weights(model)
    assert weights is not None
    seen: list[list[int]] = []
    step = DecoderStep(weights)

    def spying(slots: Any, tokens: Any, rows: Any, wanted: Any = None) -> Any:
        logits = step(slots, tokens, rows, wanted)
        seen.append(slots.lengths[rows].tolist())
        return logits

    spying.weights, spying.backend = weights, step.backend  # type: ignore[attr-defined]
    stepper = steps.by_engine(spying)(requests, 70)  # type: ignore[arg-type]
    stepper.run(), stepper.run()
    assert seen == [[71] * requests] * 2
    for other in (model, llama):
        with torch.no_grad():
            cache = steps._cache_at(other, requests, 70)
            assert cache.get_seq_length() == 70
            other(input_ids=torch.ones(requests, 1, dtype=torch.long), use_cache=True, **{cache_keyword(other): cache})
        assert cache.get_seq_length() == 71
        full = [layer for layer in cache.layers if type(layer) is DynamicLayer and layer.get_seq_length()]
        assert full and all(layer.keys.shape[::2] == (requests, 71) for layer in full)


def test_a_short_cache_is_as_prefill_leaves_it(llama: Any) -> None:
    ids = torch.ones(1, 9, dtype=torch.long)
    with torch.no_grad():
        cache = steps._cache_at(llama, 1, 8)
        step = llama(input_ids=ids[:, :1], use_cache=True, **{cache_keyword(llama): cache}).logits[:, -1]
        assert torch.allclose(step, llama(input_ids=ids).logits[:, -1], atol=1e-5)


def test_inner_is_the_model_without_the_layers_that_see_everything(model: Any) -> None:
    weights = decoder_weights(model)
    assert weights is not None
    left = [layer.mixer for layer in steps.without_full_attention(weights).layers]
    assert len(left) == 6 and not any(isinstance(m, AttentionWeights) and m.window is None for m in left)


def test_bytes_are_those_of_all_weights_and_of_what_is_remembered(model: Any) -> None:
    weights = decoder_weights(model)
    assert weights is not None
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert steps.bytes_read(weights, 0, 100) == pytest.approx(held, rel=0.05)
    of_token = 2 * 4 * 4 * 4  # keys and values, heads, width, bytes
    by = {length: steps.bytes_read(weights, 3, length) for length in (10, 11, 100, 101)}
    assert by[101] - by[100] == 3 * 2 * of_token  # the full layer, and one that reads its keys; windows are full
    assert by[11] - by[10] == 3 * 4 * of_token


# ---- curves ----


def test_the_sum_of_steps_between_lengths_is_linear() -> None:
    times = {100: 1.0, 200: 3.0, 400: 3.0}
    assert whole(times, 100, 200) == pytest.approx(200)
    assert whole(times, 150, 300) == pytest.approx(50 * 2.5 + 100 * 3)


def test_a_straight_line_is_told_from_a_curve() -> None:
    lengths = [1024 << power for power in range(6)]
    assert straight({x: 0.3 + 0.001 * x for x in lengths}) == pytest.approx(1)
    assert (straight({x: 1e-9 * x * x for x in lengths}) or 1) < 0.99
    assert straight({1: 1.0, 2: 2.0}) is None


def test_curves_of_all_sides(model: Any, llama: Any) -> None:
    curves = Curves({ENGINE: model, OWN: model, LLAMA: llama}, inner=True, rounds=1, tick=quiet)
    found = curves.measure([1, 2], [40, 80, 160], [40, 80, 160])
    assert list(found) == [1, 2] and all(list(sides) == [ENGINE, INNER, OWN, LLAMA] for sides in found.values())
    assert all(list(curve.steps) == [40, 80, 160] for sides in found.values() for curve in sides.values())
    assert [side for side, curve in found[1].items() if curve.first] == [ENGINE, OWN, LLAMA]
    rows = curve_rows(found, [40, 80, 160], {})
    assert len(rows) == 2 * 3 * 4 and not any(row.full for row in rows)
    assert all(row.tokens_per_second == pytest.approx(row.requests / row.token) for row in rows)
    assert {fit.side: fit.prefill is None for fit in fits(found)} == {
        ENGINE: False,
        INNER: True,
        OWN: False,
        LLAMA: False,
    }


def test_whole_answers_follow_from_their_steps() -> None:
    mine, theirs = Curve({10: 0.1, 30: 0.3}, {10: 2.0}, {10: 5, 30: 7}), Curve({10: 1.0}, {10: 1.0}, {10: 9})
    sides = {ENGINE: mine, LLAMA: theirs}
    ours, other = whole_rows({4: sides}, 10, 20, {4: {10: 0.05, 30: 0.15}})
    assert (ours.what, ours.seconds, ours.memory) == ("4 x (10 + 20)", pytest.approx(4 * 2 + 20 * 0.2), 7)
    assert (ours.tokens_per_second, ours.token, ours.growth) == pytest.approx((80 / 12, 0.2, 3))
    assert ours.bandwidth == pytest.approx(2 / 12)
    assert other.full and other.seconds is None
    assert fits({4: sides}) == [Fit(ENGINE, 4, pytest.approx(3), None)]


def test_other_families_have_no_curves(llama: Any) -> None:
    with pytest.raises(UsageError, match="plain SambaY model alone"):
        Curves({ENGINE: llama}, inner=False, rounds=1, tick=quiet)
