"""What transformers, TRL and peft may hand in is honoured or refused by name, never swallowed."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from tiny_sambay import tiny_model
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from sft.models import Phi4FlashForCausalLM, Phi4FlashModel
from sft.models.sambay import contract_phi4flash as contract

IDS = torch.randint(1, 96, (2, 30), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model() -> Phi4FlashForCausalLM:
    model = tiny_model(seed=8)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> torch.Tensor:
    return model(**{"input_ids": IDS, "use_cache": False, **inputs}).logits


# ---- unknown keywords ----


@pytest.mark.parametrize(
    ("keyword", "near"),
    [
        ("cu_seqlens", "cu_seq_lens_q"),
        ("cu_seq_len_q", "cu_seq_lens_q"),
        ("max_lenght_q", "max_length_q"),
        ("attention_masks", "attention_mask"),
        ("label", "labels"),
        ("seqidx", "seq_idx"),
        ("past_key_value", "past_key_values"),
        ("token_type_ids", ""),
        ("output_router_logits", ""),
        ("encoder_hidden_states", ""),
    ],
)
def test_an_unknown_keyword_is_refused_by_name(model: Any, keyword: str, near: str) -> None:
    for part in (model, model.model):
        with pytest.raises(TypeError, match=rf"`{keyword}`(.*did you mean.*`{near}`)?") as refused:
            part(input_ids=IDS, **{keyword: torch.tensor([0, 60])})
        assert (f"`{near}`" in str(refused.value)) == bool(near)
        part(input_ids=IDS, **{keyword: None})


def test_false_is_a_value_too(model: Any) -> None:
    with pytest.raises(TypeError, match="`output_router_logits`"):
        model(input_ids=IDS, output_router_logits=False)


def test_generate_refuses_a_misspelt_keyword(model: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="cu_seqlens"):
        model.generate(IDS, max_new_tokens=2, cu_seqlens=torch.tensor([0, 60]))


# ---- the cache ----


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_the_cache_is_read_under_both_of_its_names(model: Any, name: str) -> None:
    whole, cache = logits(model), DynamicCache(config=model.config)
    parts = []
    for part in IDS.split([11, 1, 8, 10], 1):
        output = model(input_ids=part, use_cache=True, **{name: cache})
        assert getattr(output, contract.CACHE_FIELD) is cache
        parts.append(output.logits)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5 * whole.abs().max()
    assert cache.get_seq_length() == 30


def test_generate_keeps_the_cache_whatever_its_name_is(model: Any) -> None:
    """The very call that went wrong: transformers 5.24 hands the cache over as `cache`."""
    plain = model.generate(IDS, max_new_tokens=12, do_sample=False, use_cache=False)
    seen = []
    hook = model.model.layers[0].register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[0]))
    try:
        assert torch.equal(model.generate(IDS, max_new_tokens=12, do_sample=False), plain)
    finally:
        hook.remove()
    assert seen == [60, *[2] * 11]  # the prompt, then one token a row


def test_two_caches_are_refused(model: Any) -> None:
    one, other = (DynamicCache(config=model.config) for _ in range(2))
    model(input_ids=IDS, cache=one, past_key_values=one)
    with pytest.raises(ValueError, match="two names for one thing"):
        model(input_ids=IDS, cache=one, past_key_values=other)


def foreign_caches(config: Any) -> dict[str, Any]:
    offloaded = DynamicCache(config=config)
    offloaded.offloading = True
    filled = DynamicCache(config=config)
    filled.layers[1].update(torch.ones(2, 4, 5, 4), torch.ones(2, 4, 5, 4))
    return {
        "static": StaticCache(config=config, max_cache_len=64),
        "no configuration": DynamicCache(),
        "offloaded": offloaded,
        "a prefix of keys": filled,
        "a tuple": ((torch.ones(2, 4, 5, 4), torch.ones(2, 4, 5, 4)),),
    }


@pytest.mark.parametrize("kind", ["static", "no configuration", "offloaded", "a prefix of keys", "a tuple"])
def test_a_cache_of_another_kind_gets_a_sentence(model: Any, kind: str) -> None:
    cache = foreign_caches(model.config)[kind]
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model\.config\)|prefix of keys"):
        model(input_ids=IDS, past_key_values=cache, use_cache=True)


def test_a_quantized_cache_gets_a_sentence(model: Any) -> None:
    cache = QuantizedCache.__new__(QuantizedCache)  # its backends are packages of their own
    with pytest.raises(ValueError, match="QuantizedCache: use DynamicCache"):
        model(input_ids=IDS, past_key_values=cache, use_cache=True)


def test_generate_with_a_static_cache_gets_a_sentence(model: Any) -> None:
    with pytest.raises(ValueError, match=r"StaticCache: use DynamicCache.*cache_implementation"):
        model.generate(IDS, max_new_tokens=3, cache_implementation="static")
    with pytest.raises(ValueError, match="StaticCache"):
        model.generate(
            IDS, max_new_tokens=3, past_key_values=StaticCache(config=model.config, max_cache_len=64), use_cache=True
        )


def test_cache_position_says_what_is_done_or_is_refused(model: Any) -> None:
    assert torch.equal(logits(model, cache_position=torch.arange(30)), logits(model))
    with pytest.raises(ValueError, match="cache_position must be 0 to 29"):
        model(input_ids=IDS, cache_position=torch.arange(30) + 4)


def test_a_cache_that_checkpointing_forbids_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    contract.logger.warning_once.cache_clear()
    assert getattr(model(input_ids=IDS), contract.CACHE_FIELD) is None and "use_cache" not in caplog.text
    assert getattr(model(input_ids=IDS, use_cache=True), contract.CACHE_FIELD) is None
    assert "use_cache=True: there is no cache while training with gradient checkpointing" in caplog.text


def test_a_cache_and_packed_documents_are_refused(model: Any) -> None:
    ids, borders = IDS.reshape(1, 60), torch.tensor([0, 30, 60], dtype=torch.int32)
    for told in ({"cu_seq_lens_q": borders}, {"position_ids": torch.arange(60)[None] % 30}):
        with pytest.raises(ValueError, match="cache"):
            model(input_ids=ids, past_key_values=DynamicCache(config=model.config), **told)
        with pytest.raises(ValueError, match="use_cache"):
            model(input_ids=ids, use_cache=True, **told)
        # By default there is none, and the documents stay apart.
        found = model(input_ids=ids, **told)
        assert getattr(found, contract.CACHE_FIELD) is None
        assert (found.logits.reshape(2, 30, -1) - logits(model)).abs().max() < 1e-5


# ---- outputs ----


@torch.no_grad()
def test_return_dict_false_gives_a_tuple(model: Any) -> None:
    loss, scores = model(input_ids=IDS, labels=IDS, return_dict=False)
    whole = model(input_ids=IDS, labels=IDS)
    assert isinstance(whole, CausalLMOutputWithPast)
    assert torch.equal(loss, whole.loss) and torch.equal(scores, whole.logits)
    assert isinstance(model.model(input_ids=IDS, return_dict=False), tuple)
    model.config.return_dict = False
    try:
        assert isinstance(model(input_ids=IDS), tuple)
        assert not isinstance(model(input_ids=IDS, return_dict=True), tuple)
    finally:
        model.config.return_dict = True


@pytest.mark.parametrize("way", ["keyword", "configuration"])
@torch.no_grad()
def test_hidden_states_are_given_when_they_are_asked_for(model: Any, way: str) -> None:
    model.config.output_hidden_states = way == "configuration"
    asked = {"output_hidden_states": True} if way == "keyword" else {}
    try:
        for more in ({}, {"logits_to_keep": 1}, {"labels": IDS, "skip_logits": True}, {"labels": IDS}):
            states = model(input_ids=IDS, **asked, **more).hidden_states
            assert [tuple(state.shape) for state in states] == [(2, 30, 32)] * 9
        assert model(input_ids=IDS, output_hidden_states=False).hidden_states is None
        last = model.model(input_ids=IDS).last_hidden_state
        assert torch.equal(last, states[-1])
    finally:
        model.config.output_hidden_states = False


def test_hidden_states_are_part_of_the_graph(model: Any) -> None:
    output = model(input_ids=IDS, output_hidden_states=True)
    for state in output.hidden_states:
        state.retain_grad()
    output.logits.sum().backward()
    assert all(state.grad is not None and state.grad.any() for state in output.hidden_states)
    model.zero_grad()


def test_the_loss_is_the_same_with_hidden_states() -> None:
    model = tiny_model(seed=2).train()
    plain = model(input_ids=IDS, labels=IDS).loss
    assert torch.isclose(model(input_ids=IDS, labels=IDS, output_hidden_states=True).loss, plain, rtol=1e-6)


def test_generate_gives_hidden_states(model: Any) -> None:
    found = model.generate(
        IDS, max_new_tokens=3, do_sample=False, output_hidden_states=True, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    widths = [[state.shape[1] for state in step] for step in found.hidden_states]
    assert widths == [[30] * 9, [1] * 9, [1] * 9]
    assert torch.equal(found.sequences, model.generate(IDS, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("way", ["keyword", "configuration", "generate"])
def test_attention_weights_are_refused(model: Any, way: str) -> None:
    with pytest.raises(ValueError, match="output_attentions is not available"):
        if way == "keyword":
            model(input_ids=IDS, output_attentions=True)
        elif way == "generate":
            model.generate(IDS, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
        else:
            other = tiny_model()
            other.config._output_attentions = other.config.__dict__["output_attentions"] = True
            other(input_ids=IDS)
    model(input_ids=IDS, output_attentions=False)


@torch.no_grad()
def test_logits_to_keep(model: Any) -> None:
    whole = logits(model)
    for kept, expected in (
        (0, whole),
        (1, whole[:, -1:]),
        (7, whole[:, -7:]),
        (30, whole),
        (99, whole),
        (torch.tensor([3, 0, 29]), whole[:, [3, 0, 29]]),
        (torch.tensor([-1]), whole[:, -1:]),
        (torch.tensor([[1, 2], [28, 4]]), torch.stack([whole[0, [1, 2]], whole[1, [28, 4]]])),
        (IDS > 50, whole[IDS > 50]),
    ):
        found = logits(model, logits_to_keep=kept)
        assert found.shape == expected.shape and (found - expected).abs().max() < 1e-5 * whole.abs().max()


@pytest.mark.parametrize("kept", [-1, 1.5, "2", [1, 2]])
def test_logits_to_keep_of_another_kind_is_refused(model: Any, kept: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="logits_to_keep"):
        model(input_ids=IDS, logits_to_keep=kept)


# ---- labels ----


def test_shift_labels_are_the_targets_themselves(model: Any) -> None:
    shifted = torch.nn.functional.pad(IDS[:, 1:], (0, 1), value=-100).masked_fill(IDS % 4 == 0, -100)
    expected = torch.nn.functional.cross_entropy(logits(model).flatten(0, 1), shifted.flatten())
    for labels in (None, IDS):  # they take precedence, as in transformers' own loss
        for skip in (False, True):
            loss = model(input_ids=IDS, labels=labels, shift_labels=shifted, skip_logits=skip, use_cache=False).loss
            assert torch.isclose(loss, expected, rtol=1e-5)
    summed = model(input_ids=IDS, shift_labels=shifted, num_items_in_batch=7).loss
    assert torch.isclose(summed * 7, expected * (shifted != -100).sum(), rtol=1e-5)


def test_labels_of_another_shape_are_refused(model: Any) -> None:
    for name in ("labels", "shift_labels"):
        with pytest.raises(ValueError, match=f"{name} has shape"):
            model(input_ids=IDS, **{name: IDS[:, 1:]})


def test_a_loss_alone_without_labels_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="skip_logits"):
        model(input_ids=IDS, skip_logits=True)


def test_a_cache_beside_a_loss_is_given_when_it_is_asked_for(model: Any) -> None:
    assert getattr(model(input_ids=IDS, labels=IDS), contract.CACHE_FIELD) is None
    cache = getattr(model(input_ids=IDS, labels=IDS, use_cache=True), contract.CACHE_FIELD)
    with torch.no_grad():
        after = model(input_ids=IDS[:, :1], past_key_values=cache).logits[:, 0]
        whole = logits(model, input_ids=torch.cat([IDS, IDS[:, :1]], 1))[:, -1]
    assert (after - whole).abs().max() < 1e-5 * whole.abs().max()


# ---- documents ----


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"cu_seq_lens_q": [0, 30, 60], "cu_seq_lens_k": [0, 31, 60]}, "must be equal"),
        ({"cu_seq_lens_q": [0, 30, 60], "cu_seq_lens_k": [0, 60]}, "equal to it"),
        ({"cu_seq_lens_k": [0, 30, 60]}, "needs cu_seq_lens_q"),
        ({"cu_seq_lens_q": [0, 40, 30, 60]}, "never fall"),
        ({"cu_seq_lens_q": []}, "empty"),
        ({"cu_seq_lens_q": [0, 20, 60], "max_length_q": 39}, "longer than max_length_q"),
        ({"cu_seq_lens_q": [0, 20, 60], "max_length_k": 39}, "longer than max_length_q"),
        ({"seq_idx": [0] * 59}, r"seq_idx has shape \(59,\)"),
        ({"position_ids": [0] * 61}, r"position_ids has shape \(61,\)"),
        ({"attention_mask": [0] * 60}, "attention_mask must be"),
        ({"attention_mask": [[1] * 30 + [2] * 30]}, "ones and zeros"),
        ({"attention_mask": [[0.0] * 30 + [-1e9] * 30]}, "ones and zeros"),
    ],
)
def test_what_is_said_of_documents_has_to_agree(model: Any, told: dict[str, Any], reason: str) -> None:
    told = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in told.items()}
    with pytest.raises(ValueError, match=reason):
        model(input_ids=IDS.reshape(1, 60), use_cache=False, **told)


@pytest.mark.parametrize("mask", [{"full": 1}, [1, 2]])
def test_a_mask_that_is_no_tensor_is_refused(model: Any, mask: Any) -> None:
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(input_ids=IDS, attention_mask=mask)


@torch.no_grad()
def test_positions_tell_documents_in_every_row(model: Any) -> None:
    positions = torch.tensor([[*range(12), *range(18)], [*range(30)]])
    found = logits(model, position_ids=positions)
    assert (found[0, :12] - logits(model, input_ids=IDS[:1, :12])[0]).abs().max() < 1e-5
    assert (found[0, 12:] - logits(model, input_ids=IDS[:1, 12:])[0]).abs().max() < 1e-5
    assert (found[1] - logits(model)[1]).abs().max() < 1e-5


@pytest.mark.parametrize("told_by", ["position_ids", "seq_idx"])
@torch.no_grad()
def test_documents_in_padded_rows(model: Any, told_by: str) -> None:
    """Left padding of 4 and 0 columns; each row holds two documents."""
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    positions = torch.tensor([[1] * 4 + [*range(10), *range(16)], [*range(7), *range(23)]])
    numbers = torch.tensor([[0] * 14 + [1] * 16, [0] * 7 + [1] * 23])
    told = {"position_ids": positions, "seq_idx": numbers}
    found = logits(model, attention_mask=mask, **{told_by: told[told_by]})
    for row, start, stop in ((0, 4, 14), (0, 14, 30), (1, 0, 7), (1, 7, 30)):
        alone = logits(model, input_ids=IDS[row : row + 1, start:stop])[0]
        assert (found[row, start:stop] - alone).abs().max() < 1e-5


@torch.no_grad()
def test_positions_that_count_columns_or_tokens_of_a_padded_row_split_nothing(model: Any) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :4] = mask[1, 9] = 0  # padding in front, and a hole
    plain = logits(model, attention_mask=mask)
    for positions in (torch.arange(30).expand(2, 30), mask.cumsum(1) - 1, (mask.cumsum(1) - 1).clamp(min=0) + 3):
        assert torch.equal(logits(model, attention_mask=mask, position_ids=positions), plain)


# ---- adapters by row ----


@pytest.mark.parametrize("how", ["forward", "generate"])
def test_adapters_by_row_get_a_sentence(how: str) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["Wqkv"], task_type="CAUSAL_LM")).eval()
    adapted.add_adapter("other", LoraConfig(r=2, target_modules=["Wqkv"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"`adapter_names` .* adapter by row"):
        if how == "forward":
            adapted(input_ids=IDS, adapter_names=["default", "other"])
        else:
            adapted.generate(input_ids=IDS, max_new_tokens=2, adapter_names=["default", "other"])


# ---- the signatures ----


def test_what_is_not_in_the_signature() -> None:
    """transformers makes a cache_position, and warns of it, where a checkpoint's forward names one; and it demands a
    warning of the cache's old name where both names are in the signature, though old versions know no other."""
    for forward in (Phi4FlashForCausalLM.forward, Phi4FlashModel.forward):
        assert not {"cache_position", "cache"} & set(inspect.signature(forward).parameters)


def test_an_evaluation_loop_leaves_the_cache_alone(model: Any) -> None:
    assert contract.CACHE_FIELD in model.config.keys_to_ignore_at_inference
