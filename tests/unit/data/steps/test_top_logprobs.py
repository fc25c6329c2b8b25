"""A teacher's likeliest tokens: what rows may hold, what is refused, and what becomes of them up to the batch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_toys import byte_tokenizer
from pydantic import ValidationError
from step_toys import context, entry, record, run_rows
from teacher_server import TeacherServer, named_tokens

from sft.data.look.find import put_aside
from sft.data.pack.arrow import row_schema
from sft.data.pack.tokens import TokenFiles, TokensWriter
from sft.data.prepare import PreparedStage
from sft.data.read.outcomes import Dropped, Kept, Replaced
from sft.data.read.record import Record, from_table, to_table
from sft.data.steps.context import Context
from sft.data.steps.generate.answer import Answer
from sft.data.steps.tokenize import Tokenize, TokenizeSettings
from sft.recipe.steps.generate import GenerateStep
from sft.tokenizers.token_bytes import token_bytes
from sft.train.collator import IGNORE, PackedCollator, PaddedCollator
from sft.utils.errors import UserError

Prepare = Callable[..., PreparedStage]
Write = Callable[..., Path]
K = 3


def teacher_of(text: str, tokenizer: Any, k: int = K, seed: int = 0) -> dict[str, Any]:
    """What a teacher with this tokenizer says of a text: random ids, of which the written one comes first."""
    rng = np.random.default_rng([seed, *text.encode()])
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    others = [rng.choice(256, k - 1, replace=False) for _ in tokens]
    ids = [[token, *(int(other) for other in row if other != token)] for token, row in zip(tokens, others, strict=True)]
    ids = [row + [-1] * (k - len(row)) for row in ids]
    shares = rng.dirichlet(np.ones(k + 1), len(tokens))[:, :k]
    return {"tokens": tokens, "ids": ids, "logprobs": np.log(shares).tolist()}


def rows_of(count: int, tokenizer: Any, k: int = K) -> list[dict[str, Any]]:
    made = []
    for number in range(count):
        text = "abcdefghij"[: 2 + number % 7] + str(number)
        made.append({"prompt": f"what is {number}?", "completion": text, "teacher": teacher_of(text, tokenizer, k)})
    return made


def distilled(path: Path, **step: Any) -> dict[str, Any]:
    return {"path": str(path), "carry": ["teacher"], "steps": [{"top_logprobs": {"column": "teacher", **step}}]}


def supervised(prepared: PreparedStage) -> dict[str, tuple[list[int], np.ndarray, np.ndarray]]:
    """Of each document its supervised ids, and what the teacher says at them."""
    found = {}
    for row in prepared.dataset.with_format("numpy"):
        ends = np.cumsum(row["seq_lengths"])[:-1]
        ids, masks = np.split(row["input_ids"], ends), np.split(row["assistant_masks"].astype(bool), ends)
        borders = np.cumsum([mask.sum() for mask in masks])[:-1]
        tops = [np.split(row[name], borders) for name in ("teacher_ids", "teacher_logprobs")]
        for name, own, mask, top, logprobs in zip(row["document_ids"], ids, masks, *tops, strict=True):
            found[str(name)] = own[mask].tolist(), top, logprobs
    return found


def check(prepared: PreparedStage, rows: list[dict[str, Any]], k: int = K) -> None:
    """Every supervised token of every row has what its row says of it; the tokens that end the turn have nothing."""
    found = supervised(prepared)
    assert len(found) == len(rows) and prepared.top_k == k
    for number, row in enumerate(rows):
        ids, top, logprobs = found[f"{prepared.manifest['inputs'][0]['files'][0]['name']}:{number + 1}"]
        teacher = row["teacher"]
        count = len(teacher["tokens"])
        assert ids[:count] == teacher["tokens"]
        width = len(teacher["ids"][0])
        assert top[:count, :width].tolist() == teacher["ids"]
        wanted = np.where(np.array(teacher["ids"]) < 0, 0, np.array(teacher["logprobs"], np.float16))
        np.testing.assert_array_equal(logprobs[:count, :width].astype(np.float16), wanted.astype(np.float16))
        assert (top[count:] == -1).all() and (logprobs[count:] == 0).all() and (top[:count, width:] == -1).all()


@pytest.mark.parametrize("packing", [False, True])
def test_rows_keep_their_teacher_up_to_the_prepared_rows(
    prepare: Prepare, write_rows: Write, toy: Any, packing: bool
) -> None:
    rows = rows_of(40, toy)
    prepared = prepare([distilled(write_rows(rows))], train={"max_length": 120, "packing": packing})
    assert prepared.manifest["packs"] < 40 if packing else prepared.manifest["packs"] == 40
    check(prepared, rows)
    schema = pa.ipc.open_stream(prepared.path / "rows-00000.arrow").schema
    assert schema.field("teacher_ids").type == pa.list_(pa.list_(pa.int32(), K))
    assert schema.field("teacher_logprobs").type == pa.list_(pa.list_(pa.float16(), K))


def test_parquet_lists_of_fixed_size_are_read(prepare: Prepare, tmp_path: Path, toy: Any) -> None:
    rows = rows_of(5, toy)
    kind = pa.struct(
        [
            ("tokens", pa.list_(pa.int32())),
            ("ids", pa.list_(pa.list_(pa.int32(), K))),
            ("logprobs", pa.list_(pa.list_(pa.float16(), K))),
        ]
    )
    half = [{**row["teacher"], "logprobs": np.array(row["teacher"]["logprobs"], np.float16).tolist()} for row in rows]
    table = {"prompt": [r["prompt"] for r in rows], "completion": [r["completion"] for r in rows]}
    pq.write_table(pa.table({**table, "teacher": pa.array(half, kind)}), tmp_path / "rows.parquet")
    check(prepare([distilled(tmp_path / "rows.parquet")]), rows)


def test_rows_without_a_teacher_are_the_bytes_that_they_were(
    prepare: Prepare, write_rows: Write, toy: Any, tmp_path: Path
) -> None:
    rows = [{key: row[key] for key in ("prompt", "completion")} for row in rows_of(5, toy)]
    prepared = prepare(write_rows(rows))
    assert prepared.top_k == 0
    schema = pa.ipc.open_stream(prepared.path / "rows-00000.arrow").schema
    names = ["input_ids", "assistant_masks", "seq_lengths", "document_ids", "document_sources"]
    assert schema == row_schema() and schema.names == names


def test_some_rows_have_a_teacher_and_some_fewer_alternatives(prepare: Prepare, write_rows: Write, toy: Any) -> None:
    rows = [*rows_of(3, toy), *rows_of(6, toy, k=2)[3:]]
    path = write_rows([*rows, {"prompt": "and this?", "completion": "alone", "teacher": None}])
    prepared = prepare([distilled(path, missing="keep")])
    found = supervised(prepared)
    *_, alone = found.items()
    assert (alone[1][1] == -1).all() and alone[1][1].shape == (len("alone") + 2, K)
    dropped = prepare([distilled(path)])
    check(dropped, rows)
    assert [row["reason"] for row in put_aside(dropped)] == ["no_top_logprobs"]


def test_a_row_that_is_cut_keeps_what_is_said_of_the_rest(prepare: Prepare, write_rows: Write, toy: Any) -> None:
    rows = [{"prompt": "q", "completion": "abcdefghij", "teacher": teacher_of("abcdefghij", toy)}]
    prepared = prepare([distilled(write_rows(rows))], train={"max_length": 8}, over_length="truncate")
    ((ids, top, _),) = supervised(prepared).values()
    assert ids == rows[0]["teacher"]["tokens"][: len(ids)] and 0 < len(ids) < 8
    assert top.tolist() == rows[0]["teacher"]["ids"][: len(ids)]


def test_another_probability_is_other_data(prepare: Prepare, write_rows: Write, toy: Any, tmp_path: Path) -> None:
    rows = rows_of(3, toy)
    first = prepare([distilled(write_rows(rows, "a/rows.jsonl"))], out=tmp_path / "x").manifest["key"]
    assert prepare([distilled(write_rows(rows, "b/rows.jsonl"))], out=tmp_path / "x").manifest["key"] == first
    rows[1]["teacher"]["logprobs"][0][0] -= 0.5
    assert prepare([distilled(write_rows(rows, "c/rows.jsonl"))], out=tmp_path / "x").manifest["key"] != first


@pytest.mark.parametrize("packed", [True, False])
def test_position_t_of_a_batch_speaks_of_label_t(prepare: Prepare, write_rows: Write, toy: Any, packed: bool) -> None:
    rows = rows_of(12, toy)
    prepared = prepare([distilled(write_rows(rows))], train={"max_length": 120, "packing": packed})
    given = list(prepared.dataset.with_format("numpy"))
    empty = {name: np.zeros(0) for name in given[0]}
    batch = (PackedCollator() if packed else PaddedCollator())([*given, empty])
    shape = batch["labels"].shape
    assert batch["teacher_ids"].shape == batch["teacher_logprobs"].shape == (*shape, K)
    assert (batch["teacher_ids"][batch["labels"] == IGNORE] == -1).all()
    wanted = {(tuple(row["teacher"]["tokens"]), tuple(map(tuple, row["teacher"]["ids"]))) for row in rows}
    labels, ids = batch["labels"].reshape(-1).tolist(), batch["teacher_ids"].reshape(-1, K).tolist()
    found, run = set(), []
    for label, row in [*zip(labels, ids, strict=True), (IGNORE, [-1] * K)]:
        if row[0] >= 0:
            assert label == row[0]  # the toy teacher names the written token first
            run.append((label, tuple(row)))
        elif run:
            found.add((tuple(label for label, _ in run), tuple(row for _, row in run)))
            run = []
    assert found == wanted


def test_batches_without_a_teacher_have_no_teacher() -> None:
    row = {"input_ids": [5, 6, 7], "assistant_masks": [0, 1, 1], "seq_lengths": [3]}
    for collator in (PackedCollator(), PaddedCollator()):
        assert not {"teacher_ids", "teacher_logprobs"} & set(collator([row]))
        with pytest.raises(ValueError, match="for 2 trained tokens"):
            collator([{**row, "teacher_ids": [[1, 2]], "teacher_logprobs": [[-1.0, -2.0]]}])


@pytest.fixture
def place(tmp_path: Path) -> Context:
    folder = tmp_path / "toy"
    byte_tokenizer().save_pretrained(folder)
    return context(tmp_path / "step", tokenizer=str(folder))


def stepped(place: Context, teacher: Any, text: str = "abcd", **settings: Any) -> Record | Dropped:
    row = record("q?", text, carried={"teacher": teacher})
    (outcome,) = run_rows("top_logprobs", [row], place, column="teacher", **settings)
    assert isinstance(outcome, Kept | Dropped)
    return outcome.record if isinstance(outcome, Kept) else outcome


FINE = {"tokens": [65, 66, 67, 68], "ids": [[65, 1], [66, 1], [67, 1], [68, 1]], "logprobs": [[-0.5, -2.0]] * 4}


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        ({"logprobs": [[-0.5, 0.1]] * 4}, "bad_top_logprobs", "0.1 at token 0 is no log probability"),
        ({"logprobs": [[-0.5, float("nan")]] * 4}, "bad_top_logprobs", "nan at token 0"),
        ({"logprobs": [[-0.5, -math.inf]] * 4}, "bad_top_logprobs", "-inf at token 0"),
        ({"logprobs": [[-0.1, -0.2]] * 4}, "bad_top_logprobs", r"at token 0 come to 1\.7"),
        ({"ids": [[65, 65], *FINE["ids"][1:]]}, "bad_top_logprobs", "named twice at token 0"),
        ({"ids": FINE["ids"][:3]}, "bad_top_logprobs", "expected n"),
        ({"ids": [[1], [2, 3], [4], [5]]}, "bad_top_logprobs", "`ids`"),
        ({"ids": [["a", "b"]] * 4}, "bad_top_logprobs", "`ids`"),
        ({"ids": [[True, False]] * 4}, "bad_top_logprobs", "`ids`"),
        ({"logprobs": None}, "bad_top_logprobs", "`logprobs`"),
        ({"tokens": [65, 66, 67, 1 << 40]}, "bad_top_logprobs", "no token ids"),
        ({"tokens": [65, 5000, 67, 68]}, "tokens_do_not_match", "the id 5000 is no token"),
    ],
)
def test_what_is_no_distribution_is_a_bad_row(place: Context, change: Any, reason: str, detail: str) -> None:
    outcome = stepped(place, {**FINE, **change})
    assert isinstance(outcome, Dropped) and outcome.reason == reason
    assert re.search(detail, outcome.detail), outcome.detail


def test_rounding_is_no_fault(place: Context) -> None:
    kept = stepped(place, {**FINE, "tokens": _ids(place, "abcd"), "logprobs": [[5e-4, -6.0]] * 4})
    assert isinstance(kept, Record) and kept.teacher_top is not None
    assert kept.teacher_top.top.logprobs.max() == 0 and "teacher" not in kept.carried
    (back,) = from_table(to_table([kept]))
    assert back.teacher_top is not None
    for one, other in (
        (back.teacher_top.tokens, kept.teacher_top.tokens),
        (back.teacher_top.top.ids, kept.teacher_top.top.ids),
        (back.teacher_top.top.logprobs, kept.teacher_top.top.logprobs),
    ):
        assert one.dtype == other.dtype and one.tolist() == other.tolist()


def _ids(place: Context, text: str) -> list[int]:
    ids: list[int] = place.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_other_tokens_than_the_texts_are_a_bad_row(place: Context) -> None:
    dropped = stepped(place, {**FINE, "tokens": _ids(place, "abXd")}, "abcd")
    assert isinstance(dropped, Dropped) and dropped.reason == "tokens_do_not_match"
    assert "token 2 (the end of 'abX')" in dropped.detail


def test_a_teacher_of_the_same_vocabulary_with_other_ids_is_mapped(
    tmp_path: Path, shared_dir: Path, place: Context
) -> None:
    """The same bytes, numbered the other way round."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    other = PreTrainedTokenizerFast(tokenizer_object=backend)
    other.save_pretrained(tmp_path / "other")
    teacher = {
        "tokens": [255 - i for i in _ids(place, "abcd")],
        "ids": [[255 - 1, 255 - 7]] * 4,
        "logprobs": [[-1, -2]] * 4,
    }
    kept = stepped(place, teacher, tokenizer=str(tmp_path / "other"))
    assert isinstance(kept, Record) and kept.teacher_top is not None
    assert kept.teacher_top.tokens.tolist() == _ids(place, "abcd")
    assert kept.teacher_top.top.ids.tolist() == [[1, 7]] * 4
    with pytest.raises(UserError, match=r"tokens of .*Phi-4-mini-flash-reasoning are tokens of the tokenizer"):
        stepped(place, FINE, tokenizer=str(shared_dir / "models" / "Phi-4-mini-flash-reasoning"))


def test_pieces_of_gpt_oss_are_found_behind_its_marks(tmp_path: Path, shared_dir: Path, phi: Any) -> None:
    from sft.data.steps.score.teacher_tokens import HARMONY

    mark = {name: number for number, name in HARMONY.items()}

    def encode(text: str) -> list[int]:
        ids: list[int] = phi(text, add_special_tokens=False)["input_ids"]
        return ids

    thought, final = encode("We add 17 and 25: that gives 42."), encode("The answer is \\boxed{42}.")
    header = [mark["<|end|>"], mark["<|start|>"], *encode("assistant"), mark["<|channel|>"], *encode("final")]
    tokens = [*thought, *header, mark["<|message|>"], *final, mark["<|return|>"]]
    teacher = {"tokens": tokens, "ids": [[number, 5] for number in tokens], "logprobs": [[-0.1, -3.0]] * len(tokens)}
    phi.save_pretrained(tmp_path / "phi")
    place = context(tmp_path / "c", tokenizer=str(tmp_path / "phi"))
    text = "<think>\nWe add 17 and 25: that gives 42.\n</think>\n\nThe answer is \\boxed{42}."
    kept = stepped(place, teacher, text)
    assert isinstance(kept, Record) and kept.teacher_top is not None
    tokens_of = _tokenized(kept, place)
    trained = tokens_of.ids[tokens_of.mask.astype(bool)].tolist()
    known = [own for own, top in zip(trained, tokens_of.top.ids[:, 0].tolist(), strict=True) if top == own]
    assert set(tokens_of.top.ids[:, 0]) - {-1} <= set(trained)
    # All but what stands before a tag, where ours joins the thought's end and the line's.
    assert len(known) >= len(thought) + len(final) - 1


def _tokenized(row: Record, place: Context) -> Any:
    step = Tokenize(TokenizeSettings(), place)
    step.sink = TokensWriter(place.folder / "again.arrow")
    (kept,) = step([row])
    assert isinstance(kept, Kept), kept
    step.sink.finish()
    assert kept.record.tokens_at is not None
    return TokenFiles(place.folder.parent)[kept.record.tokens_at]


def test_what_join_noted_is_a_teacher_of_one_token(place: Context) -> None:
    ids = _ids(place, "abcd")
    row = record("q?", "abcd", teacher_ids=ids, teacher_logprobs=[-0.5, -1.0, 0.0, -2.0])
    (outcome,) = run_rows("top_logprobs", [row], place)
    assert isinstance(outcome, Kept) and row.teacher_top is not None
    assert row.teacher_top.top.ids.tolist() == [[number] for number in ids]
    assert row.teacher_top.top.logprobs.tolist() == [[-0.5], [-1.0], [0.0], [-2.0]]


def test_a_chat_answers_logprobs_are_read(place: Context) -> None:
    content = named_tokens([bytes([byte]) for byte in b"abcd"], 2)
    assert stepped(place, {"content": content}).teacher_top.tokens.tolist() == _ids(place, "abcd")  # type: ignore[union-attr]
    strange = [*content, {"token": "<|stop|>", "bytes": None, "logprob": 0.0, "top_logprobs": []}]
    kept = stepped(place, strange)
    assert isinstance(kept, Record) and kept.teacher_top is not None
    assert kept.teacher_top.tokens.tolist() == [*_ids(place, "abcd"), -1]
    wrong = stepped(place, [content[0], strange[-1], *content[2:]])
    assert isinstance(wrong, Dropped) and wrong.reason == "tokens_do_not_match" and "(token 1)" in wrong.detail
    for bad in ("text", {"content": None}, [{"token": "a"}], [{"token": "a", "logprob": 0.0}]):
        outcome = stepped(place, bad)
        assert isinstance(outcome, Dropped) and outcome.reason == "bad_top_logprobs"


# generate


def ask(server: TeacherServer, place: Context, **settings: Any) -> Record:
    teacher = {"base_url": server.base_url, "model": "toy", "retry_delay": 0.02}
    (outcome,) = run_rows("generate", [record("1+1?", None)], place, teacher=teacher, **settings)
    assert isinstance(outcome, Replaced)
    (made,) = outcome.kept
    return made


def test_generate_asks_for_the_likeliest_tokens_and_keeps_them(server: TeacherServer, place: Context) -> None:
    tokenizer = place.tokenizer
    spelled = token_bytes(tokenizer) or {}
    server.pieces = lambda text: [spelled[number] for number in tokenizer(text, add_special_tokens=False)["input_ids"]]
    made = ask(server, place, top_logprobs=4)
    body = server.seen[0].body
    assert body["logprobs"] is True and body["top_logprobs"] == 4
    assert made.teacher_top is not None and made.completion is not None
    assert made.teacher_top.tokens.tolist() == _ids(place, made.completion)
    assert (made.teacher_top.top.ids[:, 0] == made.teacher_top.tokens).all()
    assert made.teacher_top.top.ids.shape[1] == 4
    np.testing.assert_allclose(made.teacher_top.top.logprobs[0], -np.log(2) * np.arange(1, 5), atol=2e-3)
    # From the journal, without a server.
    server.close()
    again = ask(server, place, top_logprobs=4)
    assert again.teacher_top is not None
    assert again.teacher_top.top.ids.tolist() == made.teacher_top.top.ids.tolist()
    assert made.teacher_ids is None


def test_a_server_that_gives_none_is_noted(server: TeacherServer, place: Context) -> None:
    made = ask(server, place, top_logprobs=4)
    assert made.teacher_top is None and made.facts["generate"]["no_top_logprobs"] == "the server gave none"


def test_what_is_not_asked_for_changes_no_request_and_no_journal() -> None:
    teacher = {"base_url": "http://x/v1", "model": "toy"}
    plain = GenerateStep.model_validate({"teacher": teacher})
    assert "top_logprobs" not in plain.deciding()
    assert GenerateStep.model_validate({"teacher": teacher, "top_logprobs": 5}).deciding()["top_logprobs"] == 5
    answer = Answer("a", "", "stop", 1, 1, None, "m", [(b"a", -0.5)])
    assert "top" not in answer.to_json() and Answer.from_json(answer.to_json()) == answer
    full = Answer("a", "", "stop", 1, 1, None, "m", [(b"a", -0.5)], [[(b"a", -0.5), (None, -1.0)]])
    assert Answer.from_json(json.loads(json.dumps(full.to_json()))) == full
    with pytest.raises(ValidationError, match="only mode `rollouts` keeps them"):
        entry("generate", teacher=teacher, mode="mixed", student=teacher, top_logprobs=3)


def test_bytes_of_the_published_vocabulary_spell_its_texts(phi: Any) -> None:
    spelled = token_bytes(phi)
    assert spelled is not None and len(spelled) == len(phi)
    text = "Naïve: ∑ 𝔽 of 12345 — 🙂🙃\n\n<|end|>"
    assert b"".join(spelled[number] for number in phi(text, add_special_tokens=False)["input_ids"]) == text.encode()
