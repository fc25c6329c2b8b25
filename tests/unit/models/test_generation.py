"""Generation with caches gives what the whole forward gives."""

import pytest
import torch
from sambay_kernels import causal_conv1d_step as conv_step
from sambay_kernels import selective_scan_step as scan_step
from tiny_sambay import tiny_model
from transformers import DynamicCache

from sft.models.sambay import modeling_phi4flash as modeling
from sft.models.sambay.layout_phi4flash import Layout


@pytest.fixture(scope="module")
def model():
    model = tiny_model(seed=8)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompt(length, seed=0):
    return torch.randint(1, 96, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def greedy_without_cache(model, ids, steps):
    for _ in range(steps):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("length", [1, 3, 23, 24, 30])
def test_greedy_with_cache_equals_without(model, length):
    ids = prompt(length)
    found = model.generate(ids, max_new_tokens=40, do_sample=False)
    assert torch.equal(found, greedy_without_cache(model, ids, 40))


def test_left_padded_batch_equals_one_by_one(model):
    prompts = [prompt(n, seed=n)[0] for n in (2, 31, 9, 26)]
    width = max(len(p) for p in prompts)
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts])
    found = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    for row, p in enumerate(prompts):
        alone = model.generate(p[None], max_new_tokens=30, do_sample=False)
        assert torch.equal(found[row, width:], alone[0, len(p) :])


@pytest.mark.parametrize("chunk", [1, 2, 7, 24, 50])
def test_chunked_prefill_equals_whole(model, chunk):
    ids = prompt(61)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        parts = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split(chunk, 1)]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5 * whole.abs().max()


def test_chunked_prefill_with_left_padding(model):
    width = 40
    prompts = [prompt(n, seed=n)[0] for n in (40, 13, 3)]
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for start in range(0, width, 9):
            stop = min(start + 9, width)
            last = model(
                input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True
            ).logits[:, -1]
        for row, p in enumerate(prompts):
            expected = model(input_ids=p[None], use_cache=False).logits[0, -1]
            assert (last[row] - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_decode_step_is_the_packed_pass(model, monkeypatch):
    """One token a row goes through the step ops, in place; the packed ops give the same logits and states."""
    ids = torch.stack([prompt(30, seed=n)[0] for n in (1, 2, 3)])
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[2, :25] = 0
    steps, logits, caches = [], [], []
    monkeypatch.setattr(modeling, "selective_scan_step", lambda *a, **k: steps.append(a[0]) or scan_step(*a, **k))
    monkeypatch.setattr(modeling, "causal_conv1d_step", lambda *a, **k: steps.append(a[0]) or conv_step(*a, **k))
    for packed in (False, True):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache, use_cache=True)
            model(input_ids=ids[:, 20:27], attention_mask=mask[:, :27], past_key_values=cache, use_cache=True)
            assert bool(steps) == packed  # some rows have no token yet: prefill is packed
            if packed:
                monkeypatch.setattr(Layout, "is_step", False)
            for t in range(27, 30):
                part = {"input_ids": ids[:, t : t + 1], "attention_mask": mask[:, : t + 1]}
                logits.append(model(**part, past_key_values=cache, use_cache=True).logits)
        caches.append(cache)
        assert len(steps) == 3 * 2 * 3  # tokens, ops, Mamba layers
    for one, other in zip(logits[:3], logits[3:], strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()
    for index in (0, 2, 4):
        one, other = (cache.layers[index] for cache in caches)
        assert any(state is one.recurrent_states[0] for state in steps)
        assert (one.recurrent_states[0] - other.recurrent_states[0]).abs().max() < 1e-5
        assert (one.conv_states[0] - other.conv_states[0]).abs().max() < 1e-5


def test_beams_equal_rescoring_without_cache(model):
    ids = prompt(12)
    cached = model.generate(ids, max_new_tokens=12, num_beams=3, do_sample=False)
    plain = model.generate(ids, max_new_tokens=12, num_beams=3, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


def test_sampling_is_seeded_and_varied(model):
    ids = prompt(12).repeat(8, 1)
    torch.manual_seed(1)
    first = model.generate(ids, max_new_tokens=12, do_sample=True, temperature=1.0)
    torch.manual_seed(1)
    second = model.generate(ids, max_new_tokens=12, do_sample=True, temperature=1.0)
    assert torch.equal(first, second)
    assert len({tuple(row.tolist()) for row in first}) > 1


def test_prefill_runs_the_cross_decoder_on_the_last_token_only(model):
    seen = []
    hooks = [
        model.model.layers[i].register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[0]))
        for i in (5, 6, 7)
    ]
    try:
        model.generate(prompt(30), max_new_tokens=2, do_sample=False)
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == [30, 1, 1, 1, 1, 1]


def test_the_cache_of_the_cross_decoder_is_empty(model):
    with torch.no_grad():
        cache = model(input_ids=prompt(30), use_cache=True).past_key_values
    held = [getattr(layer, "keys", None) is not None for layer in cache.layers]
    assert held == [False, True, False, True, False, True, False, False]
    assert cache.layers[1].keys.shape[2] == model.config.sliding_window - 1
    assert cache.layers[4].recurrent_states[0].dtype == torch.float32


def test_evaluation_with_right_padding_and_a_cache_is_allowed(model):
    ids = torch.cat([prompt(9), prompt(9, seed=2)])
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
        expected = model(input_ids=ids[1:, :5], use_cache=False).logits[0]
    assert (logits[1, :5] - expected).abs().max() < 1e-5 * expected.abs().max()


def test_other_models_keep_their_own_cache():
    """The published code replaces transformers' cache for every model of the process."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    output = Qwen3ForCausalLM(config).eval().generate(prompt(4) % 64, max_new_tokens=3, return_dict_in_generate=True)
    assert type(output.past_key_values) is DynamicCache
