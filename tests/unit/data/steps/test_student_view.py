"""Rank over surprisal and local naturalness, against their slow definitions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from score_toys import answer_logprobs, save_student, tiny_tokenizer
from step_toys import context, record, run_rows, run_table
from tiny_sambay import tiny_model

from sft.data.read.outcomes import Kept
from sft.data.read.record import Record
from sft.data.steps.score import ranks
from sft.data.steps.score.ranks import logprobs_and_ranks
from sft.data.steps.score.student_view import local_naturalness, local_windows, rank_surprisal
from sft.data.steps.score.token_scores import Document, TokenScorer
from sft.data.text.sentences import sentence_spans
from sft.models.load import load_checkpoint
from sft.recipe.data_checks import recipe_problems
from sft.recipe.load import load_recipe
from sft.utils.errors import UserError

ANSWERS = [
    "<think>\na = 1 + 1. b = a + 2.\nSo b = 4.\nLet c be 3. Then c + 4 = 7! Is it? Yes.\n</think>\n\nIt is 4. Good.",
    "<think>\nWe add 2 and 3.\nWe get 5.\n\nDone.\n</think>\n\nThe answer is 5.",
    "One sentence without any before it",
    "First. Second.",
]


def rows() -> list[Record]:
    return [record(f"What is {number}?", text, id=f"r{number}") for number, text in enumerate(ANSWERS)]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tmp_path_factory.mktemp("student"), tiny_tokenizer())


def scored(folder: Path, student: Path, **settings: Any) -> list[dict[str, Any]]:
    place = context(folder, tokenizer=str(student))
    outcomes = run_rows("score", rows(), place, model=str(student), required=False, **settings)
    assert all(isinstance(outcome, Kept) for outcome in outcomes)
    return [json.loads(json.dumps(outcome.record.facts["score"])) for outcome in outcomes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ranks_and_probabilities_are_those_of_the_full_logits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over borders of blocks of the vocabulary and of chunks of tokens; some tokens are alike."""
    monkeypatch.setattr(ranks, "VOCABULARY_BLOCK", 37)
    monkeypatch.setattr(ranks, "TOKENS_AT_ONCE", 11)
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 16, dtype=dtype), torch.randn(101, 16, dtype=dtype)
    targets = torch.randint(0, 101, (50,))
    targets[:4] = torch.tensor([0, 36, 37, 100])
    hidden[:2] = weight[targets[:2]]
    logits = hidden.double() @ weight.double().T
    own = logits.gather(1, targets[:, None])
    wanted = [sum(bool(other > mine) for other in row) + 1 for row, mine in zip(logits, own, strict=True)]
    assert max(wanted) > 90 and min(wanted) == 1
    found = logprobs_and_ranks(hidden, weight, targets, 60)
    assert found.dtype == dtype
    assert found[:, 1].tolist() == [min(rank, 60) for rank in wanted]
    exact = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found[:, 0].double(), exact, rtol=0, atol=1e-13 if dtype == torch.float64 else 2e-5)


def test_a_token_is_not_above_itself_in_half_precision() -> None:
    torch.manual_seed(0)
    weight = torch.randn(300, 64).bfloat16()
    targets = torch.arange(300)
    assert (logprobs_and_ranks(weight * 4, weight, targets, 300)[:, 1] == 1).all()


def test_the_ratio_is_mean_clipped_rank_over_mean_surprisal() -> None:
    random = np.random.default_rng(0)
    logprobs, clipped = -random.exponential(2.0, 40), random.integers(1, 100, 40).astype(np.float64)
    facts = rank_surprisal(logprobs, clipped)
    assert facts["rank_surprisal"] == pytest.approx(clipped.mean() / -logprobs.mean(), abs=1e-6)
    assert facts["mean_rank"] == pytest.approx(clipped.mean(), abs=1e-6)
    assert rank_surprisal(np.zeros(3), np.ones(3))["rank_surprisal"] > 1e9


@pytest.mark.parametrize(("context_", "every"), [(1, 1), (2, 1), (4, 1), (100, 1), (2, 3), (1, 2), (1, 9)])
def test_windows_are_a_sentence_and_the_few_before_it(context_: int, every: int) -> None:
    text = "One. Two two.\nThree three three. Four! Five? Six."
    spans = [(place, place + 1) for place, character in enumerate(text) if not character.isspace()]
    starts = np.array([start for start, _ in spans])
    windows = local_windows(text, starts.astype(np.int32), starts, context_, every)
    sentences = sentence_spans(text)
    chosen = {1: [1, 2, 3, 4, 5], 2: [1, 3, 5], 3: [2, 5], 9: [5]}[every]
    assert [_said(text, window, window.scored) for window in windows] == [
        "".join(text[slice(*sentences[number])].split()) for number in chosen
    ]
    for number, window in zip(chosen, windows, strict=True):
        before = text[sentences[max(0, number - context_)][0] : sentences[number][0]]
        assert _said(text, window, ~window.scored) == "".join(before.split())


def _said(text: str, window: Document, which: np.ndarray) -> str:
    return "".join(text[place] for place in window.ids[which])


def test_the_local_score_is_the_mean_over_sentences_of_the_mean_over_tokens() -> None:
    assert local_naturalness([np.array([-1.0, -3.0]), np.array([-6.0])]) == {
        "local_naturalness": -4.0,
        "local_sentences": 2,
    }
    assert local_naturalness([]) == {"local_naturalness": None, "local_sentences": 0}


def test_facts_are_what_brute_force_finds(tmp_path: Path, student: Path) -> None:
    """Each answer alone through full logits; each sentence as a text of its own with the two before it."""
    settings = {"rank_surprisal": {"max_rank": 20}, "local_naturalness": {"context": 2}}
    found = scored(tmp_path / "a", student, **settings)
    model, tokenizer = load_checkpoint(str(student), dtype="float32").double(), tiny_tokenizer()
    for item, facts in zip(rows(), found, strict=True):
        text = tokenizer.apply_chat_template(item.messages, tokenize=False)
        begin = text.rindex(item.completion or "")
        end = begin + len(item.completion or "")
        encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        places = [n for n, (start, _) in enumerate(encoding.offsets) if begin <= start < end]
        logits = _logits(model, encoding.ids)
        surprisal, clipped = 0.0, 0
        for place in places:
            row, own = logits[place - 1], logits[place - 1, encoding.ids[place]]
            surprisal -= float(row.log_softmax(0)[encoding.ids[place]])
            clipped += min(20, 1 + int((row > own).sum()))
        assert facts["rank_surprisal"] == pytest.approx(clipped / surprisal, rel=2e-6)
        assert facts["tokens"] == len(places) == len(answer_logprobs(model.float(), tokenizer, item.messages or []))
        model = model.double()
        _check_local(facts, model, encoding, begin, item.completion or "")
    assert found[2]["local_naturalness"] is None and found[3]["local_sentences"] == 1


def _check_local(facts: dict[str, Any], model: Any, encoding: Any, begin: int, answer: str) -> None:
    tokens: list[list[int]] = [[] for _ in sentence_spans(answer)]
    for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        said = answer[max(0, start - begin) : max(0, end - begin)]
        first = start - begin + (len(said) - len(said.lstrip()) if said.strip() else 0)
        for inside, (low, high) in zip(tokens, sentence_spans(answer), strict=True):
            if start >= begin and low <= first < high:
                inside.append(number)
    means = []
    for number in range(1, len(tokens)):
        before = [token for sentence in tokens[max(0, number - 2) : number] for token in sentence]
        ids = [*before, *tokens[number]]
        logprobs = _logits(model, ids).log_softmax(1)
        means.append(np.mean([float(logprobs[at - 1, ids[at]]) for at in range(len(before), len(ids))]))
    assert facts["local_sentences"] == len(means)
    if means:
        assert facts["local_naturalness"] == pytest.approx(np.mean(means), rel=2e-6)


def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0].double()
    return logits


def test_the_batch_changes_nothing(tmp_path: Path, student: Path) -> None:
    settings = {"rank_surprisal": {}, "local_naturalness": {"context": 1}}
    alone = scored(tmp_path / "a", student, batch_tokens=1, **settings)
    together = scored(tmp_path / "b", student, batch_tokens=100_000, **settings)
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert value == (pytest.approx(other[key], rel=1e-6, abs=1e-6) if isinstance(value, float) else other[key])


def test_what_is_not_asked_for_is_not_noted_nor_a_setting(tmp_path: Path, student: Path) -> None:
    from sft.data.steps.score.step import Score
    from sft.recipe.steps.score import ScoreStep

    (first, *_) = scored(tmp_path / "a", student)
    assert not {"rank_surprisal", "local_naturalness"} & set(first)
    plain = Score.settings(ScoreStep(model="m"))
    assert not {"rank_surprisal", "local_naturalness"} & set(plain)
    asked = ScoreStep.model_validate({"model": "m", "rank_surprisal": {}, "local_naturalness": {"every": 3}})
    assert Score.settings(asked)["local_naturalness"] == {"context": 4, "every": 3}
    assert Score.settings(asked)["rank_surprisal"] == {"max_rank": 100}


def test_another_causal_model_has_ranks_too() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **size)).eval()
    for one in (model, tiny_model()):
        documents = [Document(np.arange(n, n + 20, dtype=np.int32), np.arange(20) > n) for n in range(4)]
        plain, ranked = TokenScorer(one)(documents), TokenScorer(one, max_rank=96)(documents)
        for document, logprobs, both in zip(documents, plain, ranked, strict=True):
            np.testing.assert_allclose(both[:, 0], logprobs, atol=1e-5, rtol=0)
            logits = _logits(one, document.ids.tolist())
            places = np.flatnonzero(document.scored)
            wanted = [1 + int((logits[p - 1] > logits[p - 1, document.ids[p]]).sum()) for p in places]
            assert both[:, 1].tolist() == wanted


@pytest.mark.parametrize(("prefer", "kept"), [("rank_surprisal", ["r1", "r2"]), ("local_naturalness", ["r0", "r2"])])
def test_select_goes_by_what_was_noted(tmp_path: Path, prefer: str, kept: list[str]) -> None:
    views = [(5.0, -1.0), (2.0, -3.0), (3.0, -2.0), None]
    items = [record(id=f"r{number}", tokens=10) for number in range(4)]
    for item, view in zip(items, views, strict=True):
        if view is not None:
            item.facts["score"] = dict(zip(("rank_surprisal", "local_naturalness"), view, strict=True))
    found, _ = run_table("select", items, context(tmp_path), per_problem=2, prefer=[prefer])
    assert sorted(row.id for row, _ in found) == kept
    with pytest.raises(UserError, match=rf"the step `score` with `{prefer}: \{{\}}` before it"):
        run_table("select", [record(id="x")], context(tmp_path / "none"), per_problem=2, prefer=[prefer])


@pytest.mark.parametrize("prefer", ["rank_surprisal", "local_naturalness"])
def test_a_recipe_that_prefers_what_score_does_not_note_is_told(tmp_path: Path, prefer: str) -> None:
    def problems(views: str) -> list[str]:
        (tmp_path / "r.yaml").write_text(RECIPE.format(views=views, prefer=prefer))
        return [problem.message for problem in recipe_problems(load_recipe(tmp_path / "r.yaml"))]

    assert problems("") == [f"needs what score.{prefer} notes, and no such step comes before select"]
    assert problems(f", {prefer}: {{}}") == []


RECIPE = """
name: r
output_dir: runs
model: {{tokenizer: tiny, config: {{hidden_size: 64}}}}
stages:
  - name: one
    data:
      sources: [{{path: rows.jsonl}}]
      steps:
        - score: {{model: m, required: false{views}}}
        - select: {{rows: 3, prefer: [{prefer}]}}
"""
