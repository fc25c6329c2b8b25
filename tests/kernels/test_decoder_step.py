"""A decoding step in C++: the definition's results, and the same bits whatever else a step holds."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from decoder_toys import STATES, Shape, empty_slots, in_type, random_decoder, states_of
from packed_ops import backend
from sambay_kernels import (
    AttentionWeights,
    DecoderStep,
    DecoderWeights,
    LayerWeights,
    MambaWeights,
    MemoryUnitWeights,
    Slots,
)
from torch import Tensor

pytestmark = pytest.mark.usefixtures("threads_as_they_were")

SHAPES = {
    "plain": (Shape(), 3),
    "a vector of everything": (
        Shape(hidden=64, key_heads=4, head_dim=16, inner=128, states=16, rank=4, intermediate=96, windows=(24, 24)), 16
    ),
    "narrow": (Shape(hidden=6, head_dim=1, group=1, inner=3, states=1, width=2, rank=1, intermediate=5, vocab=3), 1),
    "odd": (
        Shape(
            key_heads=4, group=3, head_dim=10, inner=70, states=17, width=3, rank=17, intermediate=50, windows=(2, 7),
        ),
        5,
    ),
    "wide heads": (Shape(key_heads=4, group=3, head_dim=80, states=40, windows=(40,)), 16),
    "without windows": (Shape(windows=(), width=1, head_dim=33, group=1), 16),
}  # fmt: skip
shapes = pytest.mark.parametrize(("shape", "page_size"), SHAPES.values(), ids=SHAPES)


@pytest.fixture
def threads_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def stepper(weights: DecoderWeights, name: str = "cpp") -> DecoderStep:
    with backend(name):
        step = DecoderStep(weights)
    assert step.backend == name
    return step


def tokens_of(count: int, vocab: int, seed: int) -> Tensor:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed))


def rows_of(count: int, slots: int, seed: int) -> Tensor:
    return torch.randperm(slots, generator=torch.Generator().manual_seed(seed))[:count]


def error(found: Tensor, wanted: Tensor) -> float:
    """The root mean square of the difference, beside that of the values."""
    difference = (found.double() - wanted.double()).square().mean().sqrt()
    return float(difference / wanted.double().square().mean().sqrt().clamp_min(1e-9))


def run(step: DecoderStep, slots: Slots, steps: int) -> Tensor:
    """Steps of changing rows in changing order; all their logits."""
    count, vocab = slots.lengths.shape[0], step.weights.embed.shape[0]
    found = []
    for index in range(steps):
        rows = rows_of(1 + index % count, count, index)
        found.append(step(slots, tokens_of(len(rows), vocab, index), rows))
    return torch.cat(found)


def filled_slots(weights: DecoderWeights, lengths: list[int], page_size: int = 16, room: int = 40) -> Slots:
    """Slots of sequences that hold so many tokens, with random states."""
    slots = empty_slots(weights, slots=len(lengths), page_size=page_size, longest=max(lengths) + room)
    generator = torch.Generator().manual_seed(2)
    for name in STATES:
        state = getattr(slots, name)
        if state.is_floating_point():
            state.copy_(torch.randn(state.shape, generator=generator, dtype=torch.float64))
    slots.lengths.copy_(torch.tensor(lengths))
    return slots


def copy_of(slots: Slots, weights: DecoderWeights, dtype: torch.dtype) -> Slots:
    """The same states for weights in another type."""
    count, listed = slots.table.shape
    made = empty_slots(
        in_type(weights, dtype), slots=count, page_size=slots.page_size, longest=listed * slots.page_size
    )
    for name in (*STATES, "table"):
        getattr(made, name).copy_(getattr(slots, name))
    return made


def assert_same_states(slots: Slots, wanted: Slots, tolerance: float) -> None:
    for name, state in states_of(wanted).items():
        if state.numel():
            assert error(getattr(slots, name), state) <= tolerance, name


@shapes
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_it_is_the_definition(shape: Shape, page_size: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.set_num_threads(2)
    weights = in_type(random_decoder(shape, tied=page_size > 1), dtype)
    exact = in_type(weights, torch.float64)
    slots, wanted = (empty_slots(w, slots=4, page_size=page_size, longest=64) for w in (weights, exact))
    logits = run(stepper(weights), slots, 60)
    assert logits.dtype == dtype
    assert error(logits, run(stepper(exact, "torch"), wanted, 60)) <= tolerance
    assert_same_states(slots, wanted, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_long_sequences(dtype: torch.dtype, tolerance: float) -> None:
    """Beside short ones: attention is cut into pieces of 512 tokens."""
    weights = in_type(random_decoder(SHAPES["odd"][0]), dtype)
    slots = filled_slots(weights, [3, 505, 1020, 1600, 0, 511], 24)
    wanted = copy_of(slots, weights, torch.float64)
    logits = run(stepper(weights), slots, 24)
    assert error(logits, run(stepper(in_type(weights, torch.float64), "torch"), wanted, 24)) <= tolerance
    assert_same_states(slots, wanted, tolerance)


@shapes
def test_bfloat16_is_as_near_as_torch(shape: Shape, page_size: int) -> None:
    weights = in_type(random_decoder(shape), torch.bfloat16)
    exact = in_type(weights, torch.float64)
    slots = filled_slots(weights, [0, 3, 40, 70], page_size)
    wanted, other = copy_of(slots, weights, torch.float64), copy_of(slots, weights, torch.bfloat16)
    truth = run(stepper(exact, "torch"), wanted, 12)
    by_torch = run(stepper(weights, "torch"), other, 12)
    found = run(stepper(weights), slots, 12)
    assert found.dtype == torch.bfloat16
    assert error(found, truth) <= 2 * error(by_torch, truth) + 1e-3
    for name in STATES:
        state = getattr(wanted, name)
        if state.numel():
            bound = 2 * error(getattr(other, name), state) + 1e-3
            assert error(getattr(slots, name), state) <= bound, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["plain", "a vector of everything", "wide heads"])
def test_a_row_does_not_see_the_others(name: str, dtype: torch.dtype) -> None:
    """Bit for bit: however many there are, in any order, on any number of threads."""
    shape, page_size = SHAPES[name]
    weights = in_type(random_decoder(shape), dtype)
    step, lengths = stepper(weights), [0, 1, 2, 6, 7, 8, 15, 16, 17, 23, 24, 25, 47, 48, 49, 100, 509, 511, 512, 513]
    tokens = tokens_of(len(lengths), shape.vocab, 0)
    alone = filled_slots(weights, lengths, page_size)
    torch.set_num_threads(1)
    wanted = torch.cat([step(alone, tokens[r : r + 1], torch.tensor([r])) for r in range(len(lengths))])
    slots = filled_slots(weights, lengths, page_size)
    before = states_of(slots)
    for count in range(1, len(lengths) + 1):
        torch.set_num_threads(1 + count % 3)
        for state, value in before.items():
            getattr(slots, state).copy_(value)
        rows = rows_of(count, len(lengths), count)
        assert torch.equal(step(slots, tokens[rows], rows), wanted[rows]), count
        if count == len(lengths):
            for state, found in states_of(alone).items():
                assert torch.equal(getattr(slots, state), found), state


def cut_into_runs(counts: list[int], chance: random.Random) -> list[tuple[list[int], list[int]]]:
    """Steps (slots, places of their tokens) that read so many tokens of each slot's sequence, in runs of any length."""
    done = [0] * len(counts)
    steps: list[tuple[list[int], list[int]]] = []
    while left := [slot for slot, count in enumerate(counts) if done[slot] < count]:
        slots: list[int] = []
        places: list[int] = []
        for slot in chance.sample(left, chance.randint(1, len(left))):
            count = min(counts[slot] - done[slot], chance.choice([1, 1, 2, 5, 13, 40]))
            slots += [slot] * count
            places += range(done[slot], done[slot] + count)
            done[slot] += count
        steps.append((slots, places))
    return steps


def read(
    step: DecoderStep, slots: Slots, texts: list[Tensor], steps: list[tuple[list[int], list[int]]], seed: int
) -> dict[tuple[int, int], Tensor]:
    """The logits of a random half of the tokens, by slot and place, on one thread and two by turns."""
    found: dict[tuple[int, int], Tensor] = {}
    for index, (rows, places) in enumerate(steps):
        torch.set_num_threads(1 + index % 2)
        wanted = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed + index)) < 0.5
        tokens = torch.stack([texts[slot][place] for slot, place in zip(rows, places, strict=True)])
        chosen = [(slot, place) for slot, place, yes in zip(rows, places, wanted.tolist(), strict=True) if yes]
        found.update(zip(chosen, step(slots, tokens, torch.tensor(rows), wanted), strict=True))
    return found


def two_layers_of_pages(weights: DecoderWeights) -> DecoderWeights:
    """A memory unit and attention between layers that keep something; the last of them is a Mamba layer."""
    mamba, window, inner, full, unit, cross = weights.layers[:6]
    return replace(weights, layers=(mamba, full, unit, cross, window, full, inner, unit, cross))


DECODERS = {
    "plain": (random_decoder(Shape()), [0, 1, 6, 7, 30], [30, 50, 9, 40, 1]),
    "a vector of everything": (
        random_decoder(SHAPES["a vector of everything"][0]), [0, 20, 500, 511], [70, 30, 40, 14],
    ),
    "a window of several pieces": (random_decoder(Shape(windows=(520,))), [0, 505, 1030], [30, 40, 50]),
    "pages below": (two_layers_of_pages(random_decoder(Shape())), [0, 3, 520], [20, 40, 20]),
    "windows alone": (replace(two := random_decoder(Shape()), layers=two.layers[:2]), [0, 5, 40], [20, 30, 4]),
}  # fmt: skip
decoders = pytest.mark.parametrize(("decoder", "lengths", "counts"), DECODERS.values(), ids=DECODERS)


@decoders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_runs_are_token_by_token(
    decoder: DecoderWeights, lengths: list[int], counts: list[int], dtype: torch.dtype
) -> None:
    """Bit for bit, states and logits: over ends of windows and pages, in any company, on one thread or two."""
    weights = in_type(decoder, dtype)
    step, texts = stepper(weights), [tokens_of(count, 37, slot) for slot, count in enumerate(counts)]
    alone = filled_slots(weights, lengths, 3, room=80)
    wanted = {
        (slot, place): step(alone, text[place : place + 1], torch.tensor([slot]))[0]
        for slot, text in enumerate(texts)
        for place in range(len(text))
    }
    for seed in range(3):
        slots = filled_slots(weights, lengths, 3, room=80)
        found = read(step, slots, texts, cut_into_runs(counts, random.Random(seed)), seed)
        assert len(found) > sum(counts) / 4
        assert all(torch.equal(logits, wanted[token]) for token, logits in found.items())
        for name, state in states_of(alone).items():
            assert torch.equal(getattr(slots, name), state), name


@decoders
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_runs_are_the_definition(
    decoder: DecoderWeights, lengths: list[int], counts: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    weights = in_type(decoder, dtype)
    slots = filled_slots(weights, lengths, 5, room=80)
    exact = copy_of(slots, weights, torch.float64)
    texts = [tokens_of(count, 37, slot) for slot, count in enumerate(counts)]
    steps = cut_into_runs(counts, random.Random(0))
    found = read(stepper(weights), slots, texts, steps, 0)
    wanted = read(stepper(in_type(weights, torch.float64), "torch"), exact, texts, steps, 0)
    assert found.keys() == wanted.keys()
    assert error(torch.stack([*found.values()]), torch.stack([*wanted.values()])) <= tolerance
    assert_same_states(slots, exact, tolerance)


def test_many_tokens_at_once() -> None:
    """More than any tile of a product holds, none of them wanted but the last."""
    weights = in_type(random_decoder(SHAPES["a vector of everything"][0]), torch.bfloat16)
    step, text, row = stepper(weights), tokens_of(150, 37, 0), torch.tensor([1])
    torch.set_num_threads(2)
    whole, parts = (filled_slots(weights, [4, 9], room=200) for _ in range(2))
    each = [step(parts, token.view(1), row) for token in text]
    last = torch.arange(150) == 149
    assert torch.equal(step(whole, text, row.expand(150).contiguous(), last), each[-1])
    for name, state in states_of(parts).items():
        assert torch.equal(getattr(whole, name), state), name


@pytest.mark.parametrize("name", ["cpp", "torch"])
def test_logits_of_the_wanted_rows_alone(name: str) -> None:
    weights = in_type(random_decoder(Shape()), torch.float32)
    step, tokens, rows = stepper(weights, name), torch.tensor([1, 2, 3]), torch.tensor([2, 0, 1])
    every, some, none = (filled_slots(weights, [5, 6, 7]) for _ in range(3))
    logits = step(every, tokens, rows)
    assert torch.equal(step(some, tokens, rows, torch.tensor([False, True, True])), logits[1:])
    assert step(none, tokens, rows, torch.zeros(3, dtype=torch.bool)).shape == (0, 37)
    for state in STATES:
        assert torch.equal(getattr(some, state), getattr(every, state)), state
        assert torch.equal(getattr(none, state), getattr(every, state)), state
    assert every.lengths.tolist() == [6, 7, 8]


def test_the_definition_refuses_a_slot_in_two_places() -> None:
    weights = in_type(random_decoder(Shape()), torch.float32)
    with pytest.raises(ValueError, match="its tokens must follow each other"):
        stepper(weights, "torch")(filled_slots(weights, [5, 5]), torch.tensor([1, 1, 1]), torch.tensor([0, 1, 0]))


def test_many_rows_are_as_few() -> None:
    """More rows than any tile of a product holds."""
    weights = in_type(random_decoder(Shape()), torch.float32)
    step, lengths = stepper(weights), [i % 9 for i in range(70)]
    tokens, rows = tokens_of(70, 37, 0), torch.arange(70)
    torch.set_num_threads(2)
    whole, parts = filled_slots(weights, lengths), filled_slots(weights, lengths)
    wanted = torch.cat([step(parts, tokens[i : i + 3], rows[i : i + 3]) for i in range(0, 70, 3)])
    assert torch.equal(step(whole, tokens, rows), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_row_breaks_no_other(dtype: torch.dtype) -> None:
    weights = in_type(random_decoder(Shape()), dtype)
    step, tokens, rows = stepper(weights), torch.tensor([1, 2, 3]), torch.arange(3)
    slots, broken = (filled_slots(weights, [5, 6, 7]) for _ in range(2))
    for state in (broken.conv, broken.scan, broken.ring_keys, broken.ring_values):
        state[:, 1] = float("nan")
    wanted, found = step(slots, tokens, rows), step(broken, tokens, rows)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], wanted[[0, 2]])


def test_slots_share_pages() -> None:
    """Two samples of one prompt: its pages are listed twice, and each writes to a page of its own."""
    weights = in_type(random_decoder(Shape()), torch.float32)
    step, slots = (
        stepper(weights),
        empty_slots(in_type(random_decoder(Shape()), torch.float32), slots=3, page_size=4, longest=32),
    )
    prompt = tokens_of(9, 37, 0)
    for token in prompt[:8]:
        step(slots, token.view(1), torch.tensor([0]))
    slots.copy_slot(0, 1)
    slots.table[1, :2] = slots.table[0, :2]
    for token in prompt[:8]:
        step(slots, token.view(1), torch.tensor([2]))
    tokens = tokens_of(3, 37, 1)[[0, 1, 1]]
    for _ in range(6):
        logits = step(slots, tokens, torch.arange(3))
        assert torch.equal(logits[1], logits[2])
        assert not torch.equal(logits[0], logits[1])


def test_another_set_of_slots() -> None:
    """Slots come and go: each call is for the ones that it is given."""
    weights = in_type(random_decoder(Shape()), torch.float32)
    step, token, row = stepper(weights), torch.tensor([1]), torch.tensor([0])
    wanted = step(filled_slots(weights, [5]), token, row)
    for count in (1, 4, 2):
        slots = filled_slots(weights, [5] * count)
        first = filled_slots(weights, [5])
        for state in STATES[:4]:
            getattr(slots, state)[:, 0] = getattr(first, state)[:, 0]
        slots.page_keys[:, slots.table[0, :1].long()] = first.page_keys[:, first.table[0, :1].long()]
        slots.page_values[:, slots.table[0, :1].long()] = first.page_values[:, first.table[0, :1].long()]
        assert torch.equal(step(slots, token, row), wanted)


def test_no_row() -> None:
    weights = in_type(random_decoder(Shape()), torch.float32)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert stepper(weights)(filled_slots(weights, [5]), nothing, nothing).shape == (0, 37)


WRONG = {
    "a token below zero": ([-1, 1], [0, 1], "token -1 isn't in the vocabulary of 37"),
    "a token too high": ([1, 37], [0, 1], "token 37 isn't in the vocabulary of 37"),
    "no such slot": ([1, 1], [0, 5], "no slot 5: there are 5"),
    "a slot below zero": ([1, 1], [-1, 0], "no slot -1"),
    "a slot in two places": ([1, 1, 1], [0, 4, 0], "slot 0 is named twice: its tokens must follow each other"),
    "a run too long": ([1, 1], [4, 4], "slot 4 is full: its table lists 12 pages of 4 tokens, and it holds 48"),
    "a run into a page that isn't one": (
        [1] * 4,
        [0] * 4,
        "slot 0, which holds 8 tokens, lists a page that isn't one of 60",
    ),
    "a full slot": ([1, 1], [0, 3], "slot 3 is full: its table lists 12 pages of 4 tokens, and it holds 48"),
    "a page that isn't one": ([1], [1], "slot 1, which holds 6 tokens, lists a page that isn't one of 60"),
    "a page too high": ([1], [2], "slot 2, which holds 7 tokens, lists a page that isn't one of 60"),
    "fewer rows": ([1, 1], [0], "rows must be a contiguous torch.int64 of shape (2,)"),
}


@pytest.mark.parametrize(("tokens", "rows", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused(tokens: list[int], rows: list[int], message: str) -> None:
    weights = in_type(random_decoder(Shape()), torch.float32)
    slots = empty_slots(weights, slots=5, page_size=4, longest=48)
    slots.lengths.copy_(torch.tensor([5, 6, 7, 48, 47]))
    slots.table[0, 2], slots.table[1, 1], slots.table[2, 0] = 60, -1, 60
    before = states_of(slots)
    with pytest.raises(ValueError, match=re.escape(message)):
        stepper(weights)(slots, torch.tensor(tokens), torch.tensor(rows))
    assert all(torch.equal(getattr(slots, name), state) for name, state in before.items())


def test_tensors_of_other_forms_are_refused() -> None:
    weights = in_type(random_decoder(Shape()), torch.float32)
    step, slots = stepper(weights), filled_slots(weights, [5, 5])
    good = torch.arange(2)
    for tokens, rows in ((good.int(), good), (good, good.double()), (torch.arange(4)[::2], good), (good[None], good)):
        with pytest.raises(ValueError, match="must be a contiguous"):
            step(slots, tokens, rows)
    with pytest.raises(ValueError, match="must be a tensor"):
        step(slots, [0, 1], good)  # type: ignore[arg-type]
    for wanted in (good, good.bool()[:1], torch.ones(4, dtype=torch.bool)[::2]):
        with pytest.raises(ValueError, match="wanted must be a contiguous"):
            step(slots, good, good, wanted)
    slots.conv = slots.conv.double()
    with pytest.raises(ValueError, match=r"slots\.conv must be a contiguous torch\.float32"):
        step(slots, good, good)


def test_weights_that_do_not_fit_are_refused() -> None:
    weights = in_type(random_decoder(Shape()), torch.float32)
    first = replace(weights.layers[0], fc2=torch.zeros(20, 34))
    with pytest.raises(ValueError, match="instead of"):
        stepper(replace(weights, layers=(first, *weights.layers[1:])))
    with pytest.raises(ValueError, match="instead of"):
        stepper(replace(weights, head=weights.head.double()))
    with pytest.raises(ValueError, match="can't read 3 key heads"):
        stepper(replace(weights, key_heads=3))
    mamba, own, cross = (next(filter(kind, weights.layers)) for kind in (is_mamba, sees_all, reads_others))
    with pytest.raises(ValueError, match="reads keys and values that no layer below it makes"):
        stepper(replace(weights, layers=(mamba, cross, own)))
    unit = next(layer for layer in weights.layers if isinstance(layer.mixer, MemoryUnitWeights))
    with pytest.raises(ValueError, match="reads memory that no layer below it makes"):
        stepper(replace(weights, layers=(unit, mamba)))


def is_mamba(layer: LayerWeights) -> bool:
    return isinstance(layer.mixer, MambaWeights)


def sees_all(layer: LayerWeights) -> bool:
    return isinstance(layer.mixer, AttentionWeights) and layer.mixer.own_keys and layer.mixer.window is None


def reads_others(layer: LayerWeights) -> bool:
    return isinstance(layer.mixer, AttentionWeights) and not layer.mixer.own_keys
