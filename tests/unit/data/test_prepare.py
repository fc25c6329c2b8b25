"""Preparing a stage: every row accounted for, the store looked up by content, bad data told in one sentence."""

from __future__ import annotations

import json
import logging
import re
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_toys import stage_of
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.engine.shards import CUT
from sft.data.look.find import put_aside
from sft.data.prepare import PreparedStage, prepare_stage
from sft.utils.errors import UserError

Prepare = Callable[..., PreparedStage]
Write = Callable[..., Path]

BAD_ROWS: list[tuple[Any, str]] = [
    ("{broken", "broken_json"),
    (b"\xff\xfe", "broken_json"),
    ("[]", "not_an_object"),
    ({"prompt": "q"}, "missing_key"),
    ({"prompt": "q", "completion": 7}, "wrong_type"),
    ({"prompt": "q", "completion": ""}, "empty_answer"),
    ({"prompt": "q", "completion": "x<|end|>"}, "control_token"),
    ({"prompt": "q", "completion": "\udc00"}, "invalid_unicode"),
]


def _rows(count: int, size: int = 10) -> list[dict[str, str]]:
    return [{"prompt": f"what is {i}?", "completion": "x" * (1 + i % size)} for i in range(count)]


def _aside(prepared: PreparedStage) -> list[tuple[str, str, str]]:
    """(place, step, reason) of every row that was put aside."""
    return [(row["place"], row["step"].rpartition(": ")[2], row["reason"]) for row in put_aside(prepared)]


def test_unpacked_rows_are_the_documents(prepare: Prepare, write_rows: Write, toy: Any) -> None:
    prepared = prepare(write_rows(_rows(5)))
    assert prepared.manifest["packs"] == prepared.manifest["documents"] == len(prepared.dataset) == 5
    for i, row in enumerate(prepared.dataset):
        assert (
            toy.decode(row["input_ids"])
            == f"<|user|>what is {i}?<|end|><|assistant|>{'x' * (i + 1)}<|end|><|endoftext|>"
        )
        assert row["seq_lengths"] == [len(row["input_ids"])] and row["document_ids"] == [f"rows.jsonl:{i + 1}"]
        assert len(row["assistant_masks"]) == len(row["input_ids"]) and sum(row["assistant_masks"]) == i + 3


def test_packed_rows_hold_every_document_once(prepare: Prepare, write_rows: Write) -> None:
    path = write_rows(_rows(200))
    single, packed = prepare(path), prepare(path, train={"max_length": 100, "packing": True})
    found: dict[str, tuple[list[int], list[int]]] = {}
    for row in packed.dataset:
        assert len(row["input_ids"]) == sum(row["seq_lengths"]) <= 100
        ends = np.cumsum(row["seq_lengths"])[:-1]
        parts = zip(np.split(row["input_ids"], ends), np.split(row["assistant_masks"], ends), strict=True)
        for name, (ids, mask) in zip(row["document_ids"], parts, strict=True):
            assert name not in found
            found[name] = (ids.tolist(), mask.tolist())
    assert found == {row["document_ids"][0]: (row["input_ids"], row["assistant_masks"]) for row in single.dataset}
    for count in ("tokens", "supervised_tokens", "documents", "max_document_length"):
        assert packed.manifest[count] == single.manifest[count]
    assert packed.manifest["tokens"] == sum(len(row["input_ids"]) for row in packed.dataset)
    assert packed.manifest["supervised_tokens"] == sum(sum(row["assistant_masks"]) for row in packed.dataset)


def test_bad_rows_are_quarantined_and_the_run_goes_on(
    prepare: Prepare, write_rows: Write, caplog: pytest.LogCaptureFixture
) -> None:
    good = _rows(3)
    path = write_rows([*good, *(row for row, _ in BAD_ROWS)])
    with caplog.at_level(logging.WARNING, "sft.data"):
        prepared = prepare(path, max_bad_fraction=0.9)
    wanted = {
        (f"rows.jsonl:{line}", *(("tokenize", reason) if reason == "control_token" else ("read", f"bad: {reason}")))
        for line, (_, reason) in enumerate(BAD_ROWS, start=4)
    }
    assert set(_aside(prepared)) == wanted and len(_aside(prepared)) == len(BAD_ROWS)
    raw = {row["place"]: json.loads(row["carried"])["raw"] for row in put_aside(prepared) if row["step"] != "tokenize"}
    assert raw["rows.jsonl:4"] == "{broken" and raw["rows.jsonl:8"] == {"prompt": "q", "completion": 7}
    assert prepared.manifest["funnel"]["dropped"] == {"bad": len(BAD_ROWS)}
    assert f"{len(BAD_ROWS)} of {len(BAD_ROWS) + 3} rows are bad" in caplog.text


def test_too_many_bad_rows_stop_the_run_and_say_where_they_are(prepare: Prepare, write_rows: Write) -> None:
    path = write_rows([*_rows(97), "{", "{", "{"])
    for _ in range(2):  # the second time it is a look-up, and still refused
        with pytest.raises(UserError, match="3 of 100 rows are bad") as caught:
            prepare(path)
        assert caught.value.exit_code == 1
        assert "allows. rows.jsonl:98: " in str(caught.value)  # a first one, with what is wrong with it
    file = Path(str(caught.value).split("; see ")[1].split(",")[0])
    assert [json.loads(line)["reason"] for line in file.read_text().splitlines()] == ["broken_json"] * 3
    assert prepare(path, max_bad_fraction=0.03).manifest["documents"] == 97


def test_length_policies(prepare: Prepare, write_rows: Write, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*_rows(3), {"prompt": "q", "completion": "y" * 90}, {"prompt": "p" * 90, "completion": "lost"}]
    path = write_rows(rows)
    dropped = prepare(path, train={"max_length": 60})
    assert dropped.manifest["funnel"]["dropped"] == {"over_length": 2}
    assert _aside(dropped) == [(f"rows.jsonl:{line}", "fit", "over_length") for line in (4, 5)]
    cut = prepare(path, train={"max_length": 60}, over_length="truncate")
    assert cut.manifest["funnel"] == {
        "rows": 5, "made": 0, "kept": 4, "dropped": {"no_supervised_token": 1}, "bad": {}, "truncated": 1,
    }  # fmt: skip
    assert max(len(row["input_ids"]) for row in cut.dataset) == 60
    assert "2 of 5 rows dropped (over_length: 2)" in caplog.text
    assert "1 of 5 rows cut at max_length" in caplog.text
    with pytest.raises(UserError, match=r"rows.jsonl:4: .* more than train.max_length 60"):
        prepare(path, train={"max_length": 60}, over_length="error")
    assert prepare(path, train={"max_length": None}).manifest["documents"] == 5


def test_every_row_over_length_says_what_to_change(prepare: Prepare, write_rows: Write) -> None:
    with pytest.raises(
        UserError, match=r"No row is left .*over_length: 4.* have 16 tokens, 17 tokens, .*max_length is 5"
    ):
        prepare(write_rows(_rows(4)), train={"max_length": 5, "packing": True})


@pytest.mark.parametrize("content", [[], ["", ""]], ids=["no bytes", "blank lines"])
def test_empty_file_is_said(prepare: Prepare, write_rows: Write, content: list[str]) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl: the data is empty"):
        prepare(write_rows(content))


def test_unreadable_file_is_too_many_bad_rows(prepare: Prepare, write_rows: Write) -> None:
    with pytest.raises(UserError, match=r"2 of 2 rows are bad \(broken_json: 2\)"):
        prepare(write_rows(["nonsense", "more"]))


def test_unknown_columns_leave_nothing_behind(prepare: Prepare, write_rows: Write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it has body"):
        prepare(write_rows([{"body": "x"}]))
    assert not (tmp_path / "out").exists()


def test_second_time_is_a_look_up(prepare: Prepare, write_rows: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(_rows(20))
    first = prepare(path)

    def fail(*_: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr("sft.data.tokenize.tokens.tokenize_owned", fail)
    second = prepare(path)
    assert second.manifest == first.manifest and second.path == first.path
    assert second.dataset.to_list() == first.dataset.to_list()
    with pytest.raises(AssertionError, match="tokenised again"):
        prepare(path, system_prompt="S")


def test_key_follows_what_decides_the_rows(prepare: Prepare, write_rows: Write) -> None:
    path = write_rows(_rows(20))
    base = {"train": {"max_length": 100}}
    variants: list[dict[str, Any]] = [
        base,
        {"train": {"max_length": 99}},
        {"train": {"max_length": 100, "packing": True}},
        {**base, "prompt_template": "{prompt}!"},
        {**base, "completion_template": "{completion}!"},
        {**base, "system_prompt": "S"},
        {**base, "over_length": "truncate"},
    ]
    keys = [prepare(path, **variant).manifest["key"] for variant in variants]
    keys.append(prepare([{"path": str(path), "max_rows": 19}], **base).manifest["key"])
    keys.append(prepare(path, mask_history=True, **base).manifest["key"])
    assert len(set(keys)) == len(keys)
    assert prepare(path, train={"max_length": 100, "learning_rate": 0.1}).manifest["key"] == keys[0]
    assert prepare(path, max_bad_fraction=0.5, **base).manifest["key"] == keys[0]


def test_several_sources_are_counted_each(prepare: Prepare, write_rows: Write) -> None:
    first = write_rows([*_rows(4), "{"], "first.jsonl")
    second = write_rows(
        [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}], "second.jsonl"
    )
    prepared = prepare([{"path": str(first)}, {"path": str(second)}], max_bad_fraction=0.5)
    counted = [(entry["rows"], entry["columns"]) for entry in prepared.manifest["inputs"]]
    assert counted == [(5, {"prompt": "prompt", "completion": "completion"}), (1, {"messages": "messages"})]
    assert prepared.manifest["steps"][-1]["sources"] == {
        name: {"rows": count, "tokens": sum(len(row["input_ids"]) for row in list(prepared.dataset)[start:end])}
        for name, count, start, end in (("first", 4, 0, 4), ("second", 1, 4, 5))
    }
    assert prepared.dataset[4]["document_ids"] == ["second.jsonl:1"]
    assert [row["document_sources"] for row in prepared.dataset] == [["first"]] * 4 + [["second"]]


def test_progress_is_told(prepare: Prepare, write_rows: Write) -> None:
    told: list[tuple[str, int, int | None]] = []
    prepare(write_rows(_rows(600)), train={"packing": True}, progress=lambda *seen: told.append(seen))
    assert told[:2] == [("fit", 0, 1), ("fit", 1, 1)]
    assert told[-1][0] == "packs" and told[-1][1] == told[-1][2]


def test_many_batches_and_shards(prepare: Prepare, write_rows: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(_rows(300))
    one = prepare(path, train={"max_length": 64, "packing": True})
    monkeypatch.setattr("sft.data.pack.arrow.BATCH_TOKENS", 200)
    monkeypatch.setattr("sft.data.pack.tokens.BATCH_TOKENS", 200)
    monkeypatch.setattr("sft.data.pack.documents.BATCH", 30)
    monkeypatch.setattr("sft.data.pack.rows.SHARD_TOKENS", 1000)
    monkeypatch.setattr("sft.data.engine.builder.SHARD_ROWS", 70)
    many = prepare(path, train={"max_length": 64, "packing": True}, out=path.parent / "other")
    assert len(one.manifest["shards"]) == 1 and len(many.manifest["shards"]) > 3
    assert sum(shard["rows"] for shard in many.manifest["shards"]) == len(many.dataset)
    assert many.dataset.to_list() == one.dataset.to_list()


def test_gsm8k(shared_dir: Path, phi: Any, tmp_path: Path) -> None:
    sources = [{"path": str(shared_dir / "data" / "gsm8k"), "max_rows": 400}]
    recipe = stage_of(sources, tmp_path, {"max_length": 1024, "packing": True}, {})
    prepared = prepare_stage(recipe, recipe.stages[0], phi)
    assert prepared.manifest["funnel"]["kept"] == 400
    assert prepared.manifest["tokens"] / (len(prepared.dataset) * 1024) > 0.95
    assert prepared.dataset[0]["document_ids"][0] == "train.jsonl:1"


def test_generated_problems_with_the_built_in_tokenizer(tmp_path: Path) -> None:
    from sft.tokenizers.tiny import build_tokenizer

    tokenizer = build_tokenizer()
    recipe = stage_of([{"generate": {"rows": 60}}], tmp_path, {"max_length": 1024, "packing": True}, {})
    prepared = prepare_stage(recipe, recipe.stages[0], tokenizer)
    assert prepared.manifest["funnel"]["kept"] == 60
    row = prepared.dataset[0]
    trained = [i for i, kept in zip(row["input_ids"], row["assistant_masks"], strict=True) if kept]
    assert trained.count(tokenizer.convert_tokens_to_ids("<|end|>")) == len(row["seq_lengths"])


junk_text = st.text(max_size=30) | st.sampled_from(["", "a" * 80, "<|end|>", "\ud800"])
junk_value = junk_text | st.none() | st.integers() | st.lists(st.integers(), max_size=2)
junk_row = (
    st.fixed_dictionaries({"prompt": junk_value, "completion": junk_value})
    | st.dictionaries(st.sampled_from(["prompt", "completion", "other"]), junk_value, max_size=3)
    | st.binary(max_size=20).map(lambda raw: raw.replace(b"\n", b"?"))
    | st.just(b"")
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(junk_row, max_size=25),
    packing=st.booleans(),
    policy=st.sampled_from(["drop", "truncate"]),
)
def test_every_row_is_in_exactly_one_place(toy: Any, rows: list[Any], packing: bool, policy: str) -> None:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in [_rows(1)[0], *rows]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n")
        data = {"over_length": policy, "max_bad_fraction": 1.0}
        recipe = stage_of([{"path": str(path)}], Path(folder), {"max_length": 50, "packing": packing}, data)
        prepared = prepare_stage(recipe, recipe.stages[0], toy)
        manifest = prepared.manifest
        assert manifest["rows"] == manifest["documents"] + sum(manifest["funnel"]["dropped"].values())
        kept = [int(name.split(":")[1]) for row in prepared.dataset for name in row["document_ids"]]
        aside = [int(place.split(":")[1]) for place, _, reason in _aside(prepared) if reason != CUT]
        assert sorted(kept + aside) == [i for i, line in enumerate(lines, start=1) if line.strip()]
        assert all(sum(row["assistant_masks"]) and len(row["input_ids"]) <= 50 for row in prepared.dataset)


@pytest.mark.parametrize("policy", ["drop", "truncate", "error"])
def test_a_row_of_a_million_characters_is_too_long(
    prepare: Callable[..., PreparedStage], write_rows: Callable[..., Path], policy: str
) -> None:
    """It isn't tokenised to its end, and is what the recipe says of rows that are too long."""
    path = write_rows([{"prompt": "2+2?", "completion": "4"}, {"prompt": "2+2?", "completion": "4 " * 500_000}])
    options: dict[str, Any] = {"train": {"max_length": 64}, "over_length": policy}
    if policy == "error":
        with pytest.raises(UserError, match=r"at least [0-9]+ tokens are more than train\.max_length 64"):
            prepare(path, **options)
        return
    funnel = prepare(path, **options).manifest["funnel"]
    assert funnel["bad"] == {} and funnel["kept"] == (1 if policy == "drop" else 2)
    assert funnel["dropped"].get("over_length", 0) == (policy == "drop") and funnel["truncated"] == (policy != "drop")


@pytest.mark.parametrize(("size", "beyond"), [(258, 259), (260, 260), (261, None)])
def test_ids_beyond_the_vocabulary_are_told(
    tmp_path: Path, toy: Any, write_rows: Callable[..., Path], size: int, beyond: int | None
) -> None:
    """Before anything is prepared where the template's own tokens are among them, else when the rows are known."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"vocab_size": size}))
    rows = write_rows([{"prompt": "2+2?", "completion": "4", "system": "Add."}])
    recipe = stage_of([{"path": str(rows)}], tmp_path / "out", {"dataset_num_proc": 1}, {})
    recipe.model.model_name_or_path, recipe.model.config = str(tmp_path / "model"), None
    if beyond is None:
        assert prepare_stage(recipe, recipe.stages[0], toy).largest_id == 260
        return
    with pytest.raises(UserError, match=f"makes token {beyond}, but the model's vocabulary ends at {size - 1}"):
        prepare_stage(recipe, recipe.stages[0], toy)
    assert (tmp_path / "out").exists() == (beyond == 260)


def test_bad_rows_are_written_as_lines_that_anybody_can_open(
    prepare: Prepare, write_rows: Write, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"prompt": "2+2?", "completion": "4"}
    bad = [
        "{no json",
        {"prompt": "q"},
        {"prompt": "<|end|>", "completion": "x"},
        {"prompt": "q", "completion": "x" * 30_000, "label": False},
    ]
    source = write_rows([good, *bad])
    with pytest.raises(UserError, match=r"see \S+/bad-rows\.jsonl, then mend") as refused:
        prepare(source)
    told = re.search(r"see (\S+bad-rows\.jsonl)", str(refused.value))
    assert told is not None
    first = [json.loads(line) for line in Path(told[1]).read_text().splitlines()]
    prepared = prepare(source, max_bad_fraction=1.0)
    found = [
        json.loads(line) for path in prepared.passes for line in (path / "bad-rows.jsonl").read_text().splitlines()
    ]
    assert first == found and [row["place"] for row in found] == [f"rows.jsonl:{n}" for n in (2, 3, 5, 4)]
    assert [row["reason"] for row in found] == ["broken_json", "missing_key", "rejected_answer", "control_token"]
    assert (
        found[0]["row"] == "{no json" and found[1]["row"] == {"prompt": "q"} and "no 'completion'" in found[1]["detail"]
    )
    assert found[2]["row"].endswith("characters more") and len(found[2]["row"]) < 21_000
    assert found[3]["row"]["messages"][0]["content"] == "<|end|>"
    assert str(prepared.passes[0] / "bad-rows.jsonl") in caplog.text


def test_where_nothing_is_bad_there_is_no_file(prepare: Prepare, write_rows: Write) -> None:
    prepared = prepare(write_rows([{"prompt": "2+2?", "completion": "4"}]))
    assert not [path for folder in prepared.passes for path in folder.glob("bad-rows*")]


def test_only_the_first_of_many_bad_rows_are_written(
    prepare: Prepare, write_rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft.data.engine.bad.MOST_ROWS", 3)
    with pytest.raises(UserError, match=r"the first 3 are in (\S+bad-rows\.jsonl), then") as refused:
        prepare(write_rows([{"prompt": "q", "completion": "a"}] + [{"prompt": f"{n}"} for n in range(300)]))
    told = re.search(r"in (\S+bad-rows\.jsonl)", str(refused.value))
    assert told is not None and len(Path(told[1]).read_text().splitlines()) == 3


def test_a_row_of_any_size_takes_a_few_times_its_size(prepare: Prepare, write_rows: Write) -> None:
    size, word = 8_000_000, "The quick brown fox. "
    text = (word * (size // len(word))).strip()
    rows = [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "completion": text},
        {"prompt": "q", "completion": "{", "x": text},
    ]
    source = write_rows(rows)
    prepare(write_rows(rows[:1], "small.jsonl"))  # what is loaded once is no matter
    tracemalloc.start()
    try:
        prepared = prepare(source, train={"max_length": 64})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert prepared.manifest["funnel"]["dropped"] == {"over_length": 1} and prepared.manifest["documents"] == 2
    (aside,) = put_aside(prepared)
    assert aside["messages"][1]["content"] == text
    assert peak < 6 * size
