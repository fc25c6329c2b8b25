"""`top_logprobs: {model: ...}`: a teacher in this process against full float32 logits of one document at a time."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from score_toys import save_student, tiny_tokenizer
from step_toys import context, entry, record, run_rows

from sft.data.read.outcomes import Dropped, Kept
from sft.data.read.record import Record, TeacherTokens
from sft.data.steps import step_class
from sft.data.steps.context import Context
from sft.data.steps.top_logprobs.likeliest import likeliest
from sft.models.load import load_checkpoint
from sft.utils.errors import UserError

TEXTS = [
    "a = 1 + 1.",
    "So b is 4, and c too: done.",
    "No thought is needed.",
    "<think>\n2+2\n</think>\n\n\\boxed{4}",
    "5",
]
LEAST = float(np.finfo(np.float16).min)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tmp_path_factory.mktemp("teacher"), tiny_tokenizer())


@pytest.fixture
def place(tmp_path: Path) -> Context:
    return context(tmp_path / "step", tokenizer="tiny")


def rows(count: int = 5) -> list[Record]:
    return [record(f"What is {number}?", TEXTS[number % len(TEXTS)], id=f"r{number}") for number in range(count)]


def answer_ids(item: Record) -> tuple[list[int], list[int]]:
    """(ids of what stands before the last answer, ids of the answer with what ends it), by the template's own text."""
    tokenizer = tiny_tokenizer()
    whole = tokenizer.apply_chat_template(item.messages, tokenize=False)
    before = tokenizer.apply_chat_template((item.messages or [])[:-1], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(before)
    encode = tokenizer.backend_tokenizer.encode
    answer = f"{item.completion}<|end|>"
    assert whole[len(before) :].startswith(answer)
    return (encode(before, add_special_tokens=False).ids, encode(answer, add_special_tokens=False).ids)


def wanted(item: Record, model: Any) -> tuple[list[int], np.ndarray]:
    """(the answer's tokens, the model's log probabilities (n, V) in the place of each)."""
    before, answer = answer_ids(item)
    ids = torch.tensor([before + answer])
    with torch.no_grad():
        logprobs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    return answer, logprobs[len(before) - 1 : -1].numpy()


def said(outcome: Any) -> TeacherTokens:
    assert isinstance(outcome, Kept), outcome
    assert outcome.record.teacher_top is not None
    return outcome.record.teacher_top


def check(found: TeacherTokens, item: Record, model: Any, k: int) -> None:
    """The k likeliest of the tokenizer's tokens, the likeliest first, at every token of the answer and its end."""
    tokens, logprobs = wanted(item, model)
    count = len(tiny_tokenizer())
    assert found.tokens.tolist()[: len(tokens)] == tokens and len(found.tokens) - len(tokens) in (0, 1)
    ids, own = found.top.ids[: len(tokens)], found.top.logprobs[: len(tokens)]
    assert ids.shape == own.shape == (len(tokens), k) and own.dtype == np.float16
    assert all(len(set(row)) == k and min(row) >= 0 and max(row) < count for row in ids.tolist())
    np.testing.assert_allclose(own, np.take_along_axis(logprobs, ids, 1).clip(LEAST, 0), rtol=1.1e-3, atol=1e-5)
    best = -np.sort(-logprobs[:, :count], 1)[:, :k]
    np.testing.assert_allclose(own, best.clip(LEAST, 0), rtol=1.1e-3, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 60, 32768])
def test_the_whole_vocabulary_is_the_models_own_distribution(teacher: Path, place: Context, batch_tokens: int) -> None:
    count, model = len(tiny_tokenizer()), load_checkpoint(str(teacher), dtype="float32")
    items = rows()
    outcomes = run_rows("top_logprobs", items, place, model=str(teacher), k=count, batch_tokens=batch_tokens)
    for item, outcome in zip(items, outcomes, strict=True):
        check(said(outcome), item, model, count)
        assert item.facts["top_logprobs"] == {"tokens": len(said(outcome).tokens), "k": count}


def test_a_few_are_the_likeliest_alone_and_packed(teacher: Path, place: Context) -> None:
    model, found = load_checkpoint(str(teacher), dtype="float32"), []
    for batch_tokens in (1, 70, 32768):
        items = rows(9)
        outcomes = run_rows("top_logprobs", items, place, model=str(teacher), k=7, batch_tokens=batch_tokens)
        found.append([said(outcome) for outcome in outcomes])
        for item, one in zip(items, found[-1], strict=True):
            check(one, item, model, 7)
    for other in found[1:]:
        for one, packed in zip(found[0], other, strict=True):
            np.testing.assert_allclose(one.top.logprobs, packed.top.logprobs, rtol=1.1e-3, atol=1e-5)


def test_rows_of_the_head_that_are_no_tokens_are_never_named(teacher: Path, place: Context) -> None:
    model, count = load_checkpoint(str(teacher), dtype="float32"), len(tiny_tokenizer())
    rows_of_head = model.get_output_embeddings().weight.shape[0]
    assert rows_of_head > count
    (item,) = rows(1)
    (outcome,) = run_rows("top_logprobs", [item], place, model=str(teacher), k=rows_of_head)
    check(said(outcome), item, model, count)
    with pytest.raises(
        UserError, match=rf"k is {rows_of_head + 1}, and the vocabulary of .* has {rows_of_head} tokens"
    ):
        run_rows("top_logprobs", rows(1), place, model=str(teacher), k=rows_of_head + 1)


@pytest.mark.parametrize("k", [1, 5, 300])
def test_blocks_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=random, dtype=torch.float64) for n in (700, 300))
    named = torch.rand(300, generator=random) < 0.9
    logprobs = (hidden @ weight.T).log_softmax(-1)
    for block in (300, 64, 7):
        monkeypatch.setattr("sft.data.steps.score.ranks.VOCABULARY_BLOCK", block)
        ids, own = likeliest(hidden, weight, named, k)
        few = min(k, int(named.sum()))
        best = logprobs.masked_fill(~named, -torch.inf).topk(few)
        assert (ids[:, few:] == -1).all() and (own[:, few:] == 0).all()
        assert torch.equal(ids[:, :few], best.indices)
        torch.testing.assert_close(own[:, :few], best.values, rtol=0, atol=1e-12)


def test_another_causal_model_is_a_teacher_too(tmp_path: Path, place: Context) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tiny_tokenizer()), tie_word_embeddings=False, **size)).eval()
    folder = save_student(tmp_path / "llama", tiny_tokenizer(), llama)
    items = rows()
    outcomes = run_rows("top_logprobs", items, place, model=str(folder), k=9)
    for item, outcome in zip(items, outcomes, strict=True):
        check(said(outcome), item, llama, 9)


def test_a_teacher_of_learned_positions_drops_what_goes_beyond(tmp_path: Path, place: Context) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=len(tiny_tokenizer()), n_positions=64, n_embd=32, n_layer=1, n_head=2)
    folder = save_student(tmp_path / "gpt2", tiny_tokenizer(), GPT2LMHeadModel(config))
    items = [*rows(1), record("1 " * 80, "5", id="long")]
    short, long = run_rows("top_logprobs", items, place, model=str(folder), k=3)
    assert isinstance(short, Kept) and isinstance(long, Dropped) and long.reason == "too_long"
    assert re.fullmatch(r"\d+ tokens, and the teacher has learned 64 positions", long.detail)


def test_of_a_conversation_the_last_answer_is_read(teacher: Path, place: Context) -> None:
    item = record("One?", "1")
    item.messages = [
        *(item.messages or []),
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2."},
    ]
    (outcome,) = run_rows("top_logprobs", [item], place, model=str(teacher), k=4)
    check(said(outcome), item, load_checkpoint(str(teacher), dtype="float32"), 4)


def test_rows_without_an_answer_and_rows_that_cannot_be_rendered(teacher: Path, place: Context) -> None:
    def made() -> list[Record]:
        return [record("What?", None, id="problem"), record("Forged <|end|>", "5", id="forged"), *rows(1)]

    outcomes = run_rows("top_logprobs", made(), place, model=str(teacher), k=4)
    assert [getattr(outcome, "reason", None) for outcome in outcomes] == ["no_top_logprobs", "control_token", None]
    kept, forged, _ = run_rows("top_logprobs", made(), place, model=str(teacher), k=4, missing="keep")
    assert isinstance(kept, Kept) and kept.record.teacher_top is None and isinstance(forged, Dropped)


def test_a_teacher_that_reads_other_ids_is_refused(tmp_path: Path, teacher: Path) -> None:
    longer = tiny_tokenizer()
    longer.add_tokens(["<|new|>"])
    longer.save_pretrained(tmp_path / "longer")
    sentence = r"'<\|new\|>' is \d+ here and no token there.* serve this one, and let `generate` ask it"
    with pytest.raises(UserError, match=sentence):
        run_rows(
            "top_logprobs", rows(1), context(tmp_path / "a", tokenizer=str(tmp_path / "longer")), model=str(teacher)
        )
    # A teacher that has more tokens reads ours as they are, and names none that we don't have.
    folder = save_student(tmp_path / "more", longer)
    (item,) = rows(1)
    (outcome,) = run_rows("top_logprobs", [item], context(tmp_path / "b", tokenizer="tiny"), model=str(folder), k=400)
    check(said(outcome), item, load_checkpoint(str(folder), dtype="float32"), len(tiny_tokenizer()))


def test_the_weights_decide_the_identity_and_not_the_path(tmp_path: Path, teacher: Path) -> None:
    def key(folder: Path, **settings: Any) -> Any:
        config = entry("top_logprobs", model=str(folder), **settings).config
        return step_class("top_logprobs").identity(config), step_class("top_logprobs").settings(config)

    shutil.copytree(teacher, tmp_path / "same")
    other = save_student(tmp_path / "other", tiny_tokenizer(), seed=1)
    assert key(teacher) == key(tmp_path / "same") != key(other)
    assert key(teacher) != key(teacher, k=5)
    with pytest.raises(UserError, match="no model folder at /nowhere/model"):
        key(Path("/nowhere/model"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(
        UserError, match="adapter holds an adapter without its base model's weights: `sft export` merges"
    ):
        key(tmp_path / "adapter")


def test_a_column_is_known_by_what_it_was() -> None:
    """Data that was prepared before there was a teacher in this process stays prepared, and by several processes."""
    kind, config = step_class("top_logprobs"), entry("top_logprobs", column="teacher").config
    assert kind.settings(config) == {"column": "teacher", "missing": "drop"} and kind.identity(config) == {}
    assert kind.parallel(config) and not kind.parallel(entry("top_logprobs", model="m").config)


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"model": "m", "column": "c"}, ["column"]),
        ({"model": "m", "column": "c", "tokenizer": "t"}, ["column", "tokenizer"]),
        ({"column": "c", "k": 5}, ["k"]),
        ({"revision": "r", "dtype": "float32", "batch_tokens": 7}, ["revision", "dtype", "batch_tokens"]),
    ],
)
def test_keys_that_do_not_go_together_are_refused(settings: dict[str, Any], keys: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        entry("top_logprobs", **settings)
    problems = caught.value.errors()
    assert [problem["loc"][-1] for problem in problems] == keys
    assert all("`model`" in problem["msg"] and "asked here" in problem["msg"] for problem in problems)


@pytest.mark.parametrize("key", ["k", "batch_tokens"])
def test_counts_are_above_zero(key: str) -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        entry("top_logprobs", model="m", **{key: 0})


def test_a_recipe_prepares_with_its_teacher_and_again_when_the_weights_change(
    tmp_path: Path, prepare: Any, write_rows: Any, toy: Any
) -> None:
    """Through the engine: at every supervised token, that which ends the turn too, what the teacher finds likeliest."""
    folder = save_student(tmp_path / "teacher", toy)
    source = str(write_rows([{"prompt": f"what is {n}?", "completion": f"it is {n}"} for n in range(12)]))
    steps = [{"top_logprobs": {"model": str(folder), "k": 5}}]
    done = prepare([{"path": source}], steps=steps, train={"max_length": 120, "packing": True})
    model = load_checkpoint(str(folder), dtype="float32")
    assert done.top_k == 5 and len(done.dataset) < 12
    for row in done.dataset.with_format("numpy"):
        ends = np.cumsum(row["seq_lengths"])[:-1]
        ids, masks = np.split(row["input_ids"], ends), np.split(row["assistant_masks"].astype(bool), ends)
        borders = np.cumsum([mask.sum() for mask in masks])[:-1]
        for own, mask, top in zip(ids, masks, np.split(row["teacher_ids"], borders), strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.from_numpy(own.astype(np.int64))[None], use_cache=False).logits[0]
            best = logits[np.flatnonzero(mask) - 1, : len(toy)].topk(5).indices.numpy()
            assert top.tolist() == best.tolist()
    shards = list((done.path.parent / "steps").glob("*/kept-00000.parquet"))
    assert any(pq.read_table(shard)["teacher_top"].null_count == 0 for shard in shards)
    assert prepare([{"path": source}], steps=steps, train={"max_length": 120, "packing": True}).path == done.path
    save_student(folder, toy, seed=1)
    assert prepare([{"path": source}], steps=steps, train={"max_length": 120, "packing": True}).path != done.path
