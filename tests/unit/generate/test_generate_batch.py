"""Batched decoding equals plain recomputation, whatever the batch, and samples reproducibly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sambay_kernels import choose_token

from sft.generate import Generation, generate_batch
from sft.generate.sampling import SamplingParams, choice_of, request_randoms
from sft.utils.errors import UsageError, UserError

END = 3


class Vocabulary:
    """All that generation asks of a tokenizer."""

    eos_token_id = END

    def get_vocab(self) -> dict[str, int]:
        return {"<|endoftext|>": END, "<|end|>": 5}


def qwen3(sliding: bool = False) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=37,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        use_sliding_window=sliding,
        sliding_window=6 if sliding else None,
        layer_types=["sliding_attention", "full_attention"] if sliding else ["full_attention"] * 2,
        initializer_range=0.4,
    )
    return Qwen3ForCausalLM(config).eval()


def mamba_hybrid() -> Any:
    """A hybrid whose cache has convolution and recurrent states beside keys and values."""
    from transformers import BambaConfig, BambaForCausalLM

    torch.manual_seed(0)
    config = BambaConfig(
        vocab_size=37,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_chunk_size=16,
        initializer_range=0.4,
    )
    return BambaForCausalLM(config).eval()


def sambay() -> Any:
    modeling = pytest.importorskip("sft.models", reason="the SambaY model")
    torch.manual_seed(0)
    config = modeling.Phi4FlashConfig(
        vocab_size=37,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=6,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=END,
    )
    return modeling.Phi4FlashForCausalLM(config).eval()


MODELS = {"qwen3": qwen3, "sliding": lambda: qwen3(sliding=True), "bamba": mamba_hybrid, "sambay": sambay}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def prompts(count: int = 9) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 14, (count,), generator=generator).tolist()
    return [torch.randint(6, 37, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def recomputed(model: Any, prompt: list[int], steps: int, ends: set[int]) -> Generation:
    """Greedy decoding with neither cache nor batch: the whole text through the model for every token."""
    ids = list(prompt)
    for _ in range(steps):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] in ends:
            return Generation(ids[len(prompt) : -1], True)
    return Generation(ids[len(prompt) :], False)


@pytest.fixture(scope="module")
def expected(model: Any) -> tuple[set[int], list[Generation]]:
    """End tokens that stop completions at different times, so that rows leave the batch midway; and the completions."""
    free = [recomputed(model, prompt, 16, set()).ids for prompt in prompts()]
    ends = {free[0][5], free[1][8], free[2][2]}
    cut = [next((i for i, token in enumerate(ids) if token in ends), None) for ids in free]
    assert len({i for i in cut if i is not None}) > 1
    return ends, [Generation(ids[:i], i is not None) for ids, i in zip(free, cut, strict=True)]


@pytest.mark.parametrize(("batch_size", "prefill_chunk"), [(1, None), (4, None), (4, 5), (32, None)])
def test_greedy_equals_recomputation_without_cache(
    model: Any, expected: tuple[set[int], list[Generation]], batch_size: int, prefill_chunk: int | None
) -> None:
    ends, completions = expected
    got = generate_batch(
        model,
        Vocabulary(),
        prompts(),
        max_new_tokens=16,
        batch_size=batch_size,
        eos_ids=ends,
        prefill_chunk=prefill_chunk,
    )
    assert got == completions


def test_sampling_does_not_depend_on_the_batch(model: Any) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.9, "top_p": 0.9, "seed": 7, "eos_ids": {4, 9}}
    one = generate_batch(model, Vocabulary(), prompts(), batch_size=1, **settings)
    assert generate_batch(model, Vocabulary(), prompts(), batch_size=4, **settings) == one
    assert generate_batch(model, Vocabulary(), prompts(), batch_size=9, **settings) == one
    part = generate_batch(model, Vocabulary(), prompts()[5:], batch_size=3, requests=[5, 6, 7, 8], **settings)
    assert part == one[5:]
    assert generate_batch(model, Vocabulary(), prompts(), batch_size=9, **{**settings, "seed": 8}) != one


def test_same_prompt_samples_differently_per_request() -> None:
    got = generate_batch(
        qwen3(), Vocabulary(), [[7, 8]] * 6, max_new_tokens=12, temperature=1.0, eos_ids=(), batch_size=6
    )
    assert len({tuple(generation.ids) for generation in got}) == 6


def test_end_token_is_not_part_of_the_ids_and_cut_is_told_apart() -> None:
    model = qwen3()
    free = recomputed(model, [8, 9], 10, set()).ids
    ended = generate_batch(model, Vocabulary(), [[8, 9]], max_new_tokens=10, eos_ids={free[4]})[0]
    assert ended.finished and ended.ids == free[: free.index(free[4])]
    cut = generate_batch(model, Vocabulary(), [[8, 9]], max_new_tokens=3, eos_ids=())[0]
    assert not cut.finished and cut.ids == free[:3]
    at_once = generate_batch(model, Vocabulary(), [[8, 9]], max_new_tokens=10, eos_ids={free[0]})[0]
    assert at_once == Generation([], True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_count_into_the_length(temperature: float) -> None:
    """Short and long prompts in one batch: each completion ends where its prompt's room does, the same till there."""
    asked: dict[str, Any] = {"eos_ids": {9}, "batch_size": 3, "temperature": temperature, "seed": 1}
    free = generate_batch(qwen3(), Vocabulary(), prompts(), max_new_tokens=8, **asked)
    seen: dict[int, Generation] = {}
    got = generate_batch(
        qwen3(), Vocabulary(), prompts(), max_new_tokens=8, max_length=12, on_done=seen.__setitem__, **asked
    )
    rooms = [max(0, min(8, 12 - len(prompt))) for prompt in prompts()]
    assert {0, 8} < set(rooms)
    for long, short, room in zip(free, got, rooms, strict=True):
        ended = long.finished and len(long.ids) < room
        assert short == (long if ended else Generation(long.ids[:room], False))
    assert [seen[index] for index in range(len(got))] == got


@pytest.mark.parametrize("source", ["generation_config", "tokenizer", "chat"])
def test_completions_end_at_the_end_tokens_of_model_tokenizer_and_chat_format(source: str) -> None:
    model, tokenizer = qwen3(), Vocabulary()
    model.generation_config.eos_token_id = None
    end = recomputed(model, [8, 9], 10, set()).ids[4]
    if source == "generation_config":
        model.generation_config.eos_token_id = [end]
    elif source == "tokenizer":
        tokenizer.eos_token_id = end
    else:
        tokenizer.get_vocab = lambda: {"<|im_end|>": end}  # type: ignore[method-assign]
    assert generate_batch(model, tokenizer, [[8, 9]], max_new_tokens=10)[0].finished


def test_the_models_own_sampling_settings_take_no_part() -> None:
    model = qwen3()
    settings: dict[str, Any] = {"max_new_tokens": 8, "eos_ids": ()}
    before = [generate_batch(model, Vocabulary(), prompts(), temperature=t, **settings) for t in (0.0, 1.0)]
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.1, top_p=0.1, repetition_penalty=9.0)
    assert [generate_batch(model, Vocabulary(), prompts(), temperature=t, **settings) for t in (0.0, 1.0)] == before


def test_mode_and_global_randomness_are_left_alone() -> None:
    model = qwen3()
    model.train()
    model.model.layers[0].eval()
    state = torch.get_rng_state()
    generate_batch(model, Vocabulary(), [[8], [9, 10]], max_new_tokens=3, temperature=1.0)
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training
    assert torch.equal(torch.get_rng_state(), state)


def test_adapters_take_part() -> None:
    from peft import LoraConfig, get_peft_model

    model = qwen3()
    base = generate_batch(model, Vocabulary(), prompts(), max_new_tokens=8, eos_ids=())
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    got = generate_batch(adapted, Vocabulary(), prompts(), max_new_tokens=8, eos_ids=())
    assert got != base
    assert got == generate_batch(adapted.merge_and_unload(), Vocabulary(), prompts(), max_new_tokens=8, eos_ids=())


def test_on_done_reports_each_request_once() -> None:
    seen: dict[int, Generation] = {}
    got = generate_batch(
        qwen3(), Vocabulary(), prompts(), max_new_tokens=8, batch_size=3, eos_ids={9}, on_done=seen.__setitem__
    )
    assert [seen[index] for index in range(len(got))] == got


@pytest.mark.parametrize("batch_size", [2, 5])
def test_prompts_that_come_later_are_answered_as_those_that_came_at_once(model: Any, batch_size: int) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.9, "seed": 7, "eos_ids": {4, 9}}
    expected = generate_batch(model, Vocabulary(), prompts(), **settings)
    waiting, rooms = list(zip(prompts(), range(len(prompts())), strict=True))[1:], []

    def more(room: int) -> list[tuple[list[int], int]]:
        rooms.append(room)
        return [waiting.pop(0)] if waiting and room and (len(rooms) % 2 or room == batch_size) else []

    seen: dict[int, Generation] = {}
    settings |= {"batch_size": batch_size, "more": more, "on_done": seen.__setitem__}
    assert generate_batch(model, Vocabulary(), prompts()[:1], **settings) == expected
    assert not waiting and max(rooms) <= batch_size
    assert [seen[index] for index in range(len(expected))] == expected


def test_bad_input_is_refused() -> None:
    with pytest.raises(UsageError, match="Prompt 1 has no tokens"):
        generate_batch(qwen3(), Vocabulary(), [[8], []], max_new_tokens=3)
    with pytest.raises(UsageError, match="max_new_tokens"):
        generate_batch(qwen3(), Vocabulary(), [[8]], max_new_tokens=0)
    with pytest.raises(UserError, match=r"Prompt 1: token 37 isn't in the vocabulary \(0 to 36\) of the model"):
        generate_batch(qwen3(), Vocabulary(), [[8], [9, 37]], max_new_tokens=3)
    assert generate_batch(qwen3(), Vocabulary(), [], max_new_tokens=3) == []


def test_broken_weights_are_an_error_and_not_an_answer() -> None:
    model = qwen3()
    with torch.no_grad():
        model.lm_head.weight[20] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        generate_batch(model, Vocabulary(), [[8]], max_new_tokens=3)


def test_sampling_follows_the_distribution_and_top_p_cuts_it() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    randoms = request_randoms(0, 0, 20_000)
    logits = probabilities.log().expand(len(randoms), 4)

    def shares(**settings: float) -> torch.Tensor:
        params = [SamplingParams(**settings)] * len(randoms)  # type: ignore[arg-type]
        tokens, _ = choose_token(logits, choice_of(params, randoms, logits.device))
        return tokens.bincount(minlength=4) / len(randoms)

    assert torch.allclose(shares(temperature=1.0), probabilities, atol=0.015)
    nucleus = torch.tensor([0.625, 0.375, 0.0, 0.0])
    for settings in ({"top_p": 0.7}, {"top_k": 2}, {"min_p": 0.55}):
        assert torch.allclose(shares(temperature=1.0, **settings), nucleus, atol=0.015)
    assert torch.allclose(shares(temperature=0.5), probabilities**2 / (probabilities**2).sum(), atol=0.015)
