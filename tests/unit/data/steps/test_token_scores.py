"""Log probabilities of tokens, against one document at a time through full float32 logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_sambay import tiny_model

from sft.data.steps.score.token_scores import Document, TokenScorer, in_batches
from sft.utils.errors import UserError


def documents(seed: int = 0, lengths: tuple[int, ...] = (30, 1, 57, 2, 44, 9, 80)) -> list[Document]:
    """Documents over a vocabulary of 96, with a scored stretch at the end of each; the last but one has none."""
    random = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(lengths):
        scored = np.arange(length) >= max(1, length // 3)
        if number == len(lengths) - 2:
            scored[:] = False
        scored &= random.random(length) < 0.8
        made.append(Document(random.integers(0, 96, length).astype(np.int32), scored))
    return made


def alone(model: torch.nn.Module, document: Document) -> np.ndarray:
    """The independent way: one document, all logits in float32, log_softmax."""
    ids = torch.from_numpy(document.ids.astype(np.int64))
    with torch.no_grad():
        logprobs = model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
    places = np.flatnonzero(document.scored)
    return np.array([float(logprobs[place - 1, ids[place]]) for place in places])


@pytest.mark.parametrize("batch_tokens", [1, 64, 100000])
def test_packed_scores_are_those_of_each_document_alone(batch_tokens: int) -> None:
    model, items = tiny_model(), documents()
    results = TokenScorer(model, batch_tokens)(items)
    assert [len(result) for result in results] == [int(item.scored.sum()) for item in items]
    for item, result in zip(items, results, strict=True):
        np.testing.assert_allclose(result, alone(model, item), atol=1e-5, rtol=0)
    assert len({round(float(value), 3) for result in results for value in result}) > 50


def test_neighbours_and_order_change_nothing_beyond_rounding() -> None:
    model, items = tiny_model(seed=1), documents(seed=1)
    scorer = TokenScorer(model, 120)
    straight = scorer(items)
    order = [4, 6, 0, 2, 1, 5, 3]
    for place, result in zip(order, scorer([items[place] for place in order]), strict=True):
        np.testing.assert_allclose(result, straight[place], atol=2e-6, rtol=0)


def peak_bytes() -> int:
    """The most memory that this process held since the peak was last reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is told by Linux")
def test_full_logits_are_never_made() -> None:
    tokens, vocabulary = 4000, 50_000
    model = tiny_model(vocab_size=vocabulary)
    ids = np.random.default_rng(0).integers(0, vocabulary, tokens).astype(np.int32)
    document = Document(ids, np.arange(tokens) > 0)
    scorer = TokenScorer(model)
    scorer([Document(ids[:300], document.scored[:300])])
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    (scores,) = scorer([document])
    assert len(scores) == tokens - 1
    assert peak_bytes() - before < tokens * vocabulary * 4 / 3


def test_another_causal_model_runs_one_document_at_a_time() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ).eval()
    items = documents()
    for item, result in zip(items, TokenScorer(model, 1000)(items), strict=True):
        np.testing.assert_allclose(result, alone(model, item), atol=1e-5, rtol=0)


def test_a_model_whose_logits_are_scaled_is_refused() -> None:
    from transformers import CohereConfig, CohereForCausalLM

    model = CohereForCausalLM(
        CohereConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    )
    with pytest.raises(UserError, match="logits otherwise"):
        TokenScorer(model)


def test_what_cannot_be_scored_is_refused() -> None:
    scorer = TokenScorer(tiny_model())
    ids, marks = np.arange(5, dtype=np.int32), np.arange(5) > 1
    with pytest.raises(ValueError, match="first token"):
        scorer([Document(ids, np.ones(5, bool))])
    with pytest.raises(ValueError, match="5 ids and 4 marks"):
        scorer([Document(ids, marks[:4])])
    with pytest.raises(UserError, match="96 tokens, but the tokenizer gives the id 100"):
        scorer([Document(ids + 96, marks)])
    broken = tiny_model()
    with torch.no_grad():
        broken.model.final_layernorm.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        TokenScorer(broken)([Document(ids, marks)])
    assert scorer([]) == []


def test_batches_hold_neighbours_up_to_the_limit() -> None:
    assert list(in_batches([3, 4, 9, 1, 0, 8], int, 8)) == [[3, 4], [9], [1, 0], [8]]
