"""Token accuracy and entropy of what is trained: equal to those of full logits, by source, epoch, and after a stop."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from train_toys import read_metrics, signal_at, tiny_qwen, tiny_sambay, toy_rows, train_toy

from sft.train.collator import IGNORE, PaddedCollator
from sft.train.interrupt import Interrupted
from sft.train.memorised import NAT, TokenSums

SOURCES = ("books", "web")
STILL = {"learning_rate": 0.0, "lr_scheduler_type": "constant", "logging_steps": 1}


def rows_of_sources(rows: int, *, packed: bool) -> Any:
    """Toy rows whose documents come from two sources in turn."""
    prepared = toy_rows(rows, packed=packed)
    named = [
        [SOURCES[(row + place) % 2] for place in range(len(ids))]
        for row, ids in enumerate(prepared.dataset["document_ids"])
    ]
    prepared.dataset = prepared.dataset.add_column("document_sources", named)
    return prepared


@torch.no_grad()
def definition(model: Any, prepared: Any) -> dict[str, tuple[float, float]]:
    """Accuracy and entropy by source ("": of all), from the logits of each document by itself."""
    found: dict[str, list[tuple[bool, float]]] = {}
    for row in prepared.dataset:
        start = 0
        for length, source in zip(row["seq_lengths"], row["document_sources"], strict=True):
            part = slice(start, start + length)
            start += length
            one = {
                "input_ids": row["input_ids"][part],
                "assistant_masks": row["assistant_masks"][part],
                "seq_lengths": [length],
            }
            batch = PaddedCollator()([one])
            logits = model.double()(input_ids=batch["input_ids"], use_cache=False).logits[0, :-1]
            targets = batch["labels"][0, 1:]
            kept = targets != IGNORE
            entropy = torch.distributions.Categorical(logits=logits[kept]).entropy()
            pairs = list(zip((logits[kept].argmax(-1) == targets[kept]).tolist(), entropy.tolist(), strict=True))
            for name in ("", source):
                found.setdefault(name, []).extend(pairs)
    return {
        name: tuple(sum(column) / len(pairs) for column in zip(*pairs, strict=True)) for name, pairs in found.items()
    }


@pytest.mark.parametrize("make", [tiny_sambay, tiny_qwen])
@pytest.mark.parametrize(
    "train",
    [
        {"packing": True, "per_device_train_batch_size": 8},
        {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"packing": False, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ],
)
def test_they_are_those_of_full_logits_however_the_batch_is_cut(tmp_path: Path, make: Any, train: Any) -> None:
    """Also of a model with `logits` that many documents predict alike: nothing moves at a learning rate of zero."""
    prepared = rows_of_sources(8, packed=train["packing"])
    manifest, paths = train_toy(tmp_path, {**STILL, **train, "max_steps": 1}, model=make(), prepared=prepared)
    (line,) = read_metrics(paths.metrics("one"))
    for name, (accuracy, entropy) in definition(make(), prepared).items():
        suffix = f"/{name}" if name else ""
        assert line["mean_token_accuracy" + suffix] == pytest.approx(accuracy, abs=1e-6)
        assert line["entropy" + suffix] == pytest.approx(entropy, abs=1e-4)
        for key in ("mean_token_accuracy", "entropy"):
            assert line["epoch_" + key + suffix] == line[key + suffix]
    assert manifest["token_statistics"] == [
        {"epoch": 1.0} | {k[6:]: v for k, v in line.items() if k.startswith("epoch_")}
    ]


def test_rows_that_name_no_source_are_counted_together(tmp_path: Path) -> None:
    _, paths = train_toy(tmp_path, {**STILL, "max_steps": 1})
    (line,) = read_metrics(paths.metrics("one"))
    assert {"mean_token_accuracy", "entropy"} <= line.keys() and not any("/" in key for key in line)


def test_a_model_s_own_loss_tells_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft.train.probe.chunk_own_loss", lambda *_: False)
    manifest, paths = train_toy(tmp_path, {**STILL, "max_steps": 1})
    assert "entropy" not in read_metrics(paths.metrics("one"))[0] and manifest["token_statistics"] == []


def test_an_epoch_is_told_on_the_first_line_after_it_and_all_in_the_manifest(tmp_path: Path) -> None:
    train = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "logging_steps": 5}
    manifest, paths = train_toy(tmp_path, train, prepared=toy_rows(16, packed=False))
    lines = read_metrics(paths.metrics("one"))
    assert [line["step"] for line in lines] == [5, 10]
    assert [found["epoch"] for found in manifest["token_statistics"]] == [1.0, 2.0, 3.0]
    told = [line["epoch_mean_token_accuracy"] for line in lines]
    assert told == [found["mean_token_accuracy"] for found in manifest["token_statistics"][:2]]


def test_resumed_is_straight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a logging window, and of an epoch; a learned sequence shows as accuracy."""
    train = {"packing": True, "per_device_train_batch_size": 2, "max_steps": 30, "logging_steps": 8, "save_steps": 5}
    straight, paths = train_toy(tmp_path / "straight", train, prepared=rows_of_sources(14, packed=True))
    with monkeypatch.context() as patch:
        signal_at(patch, 11, signal.SIGTERM)
        with pytest.raises(Interrupted):
            train_toy(tmp_path / "resumed", train, prepared=rows_of_sources(14, packed=True))
    resumed, again = train_toy(tmp_path / "resumed", train, prepared=rows_of_sources(14, packed=True))

    def told(path: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if "accuracy" in k or "entropy" in k} for line in read_metrics(path)]

    assert told(again.metrics("one")) == told(paths.metrics("one"))
    assert resumed["token_statistics"] == straight["token_statistics"]
    first, last = straight["token_statistics"][0], straight["token_statistics"][-1]
    assert last["mean_token_accuracy"] > first["mean_token_accuracy"] and last["entropy"] < first["entropy"]
    assert {key.partition("/")[2] for key in first} == {"", *SOURCES}


def test_sums_hold_a_billion_tokens() -> None:
    """Of the highest entropy that 2^18 words allow."""
    sums = TokenSums(kept={"total": [[0, 0, 0]], "window": [[0, 0, 0]], "epoch": [[0, 0, 0]], "epochs": [], "told": 0})
    sums._here = torch.tensor([[10**9, 10**9 * int(12.48 * NAT), 10**9]])
    assert sums.window() == {"mean_token_accuracy": 1.0, "entropy": pytest.approx(12.48, abs=1e-6)}
