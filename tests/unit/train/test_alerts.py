"""Alerts: told once for each time that something begins, a JSON line each, and no reason to stop."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from train_toys import read_metrics, tiny_sambay, train_toy

from sft.train.alerts import Alerts, read_alerts


def log(alerts: Alerts, step: int, **logs: float) -> None:
    state: Any = SimpleNamespace(global_step=step)
    alerts.on_log(None, state, None, logs=logs)  # type: ignore[arg-type]


def test_rows_that_are_known_by_heart_are_told_each_time_that_begins(tmp_path: Path) -> None:
    alerts = Alerts(tmp_path / "alerts.jsonl", "one")
    for step, accuracy in enumerate([0.5, 0.99, 1.0, 0.9, 0.995, 0.999]):
        log(alerts, step, mean_token_accuracy=accuracy)
    found = read_alerts(tmp_path / "alerts.jsonl")
    assert [(one["step"], one["kind"]) for one in found] == [(1, "memorising"), (4, "memorising")]
    assert found[0]["message"] == "99.0% of the trained tokens are the likeliest ones"
    assert set(found[0]) == {"time", "stage", "step", "rank", "kind", "message"}


def test_a_few_tokens_that_are_all_right_by_chance_are_told_once(tmp_path: Path) -> None:
    """50 tokens a step, of which 47 to 50 are right: 99.2% over twenty steps, and then 96%."""
    alerts = Alerts(tmp_path / "alerts.jsonl", "one")
    right = [50, 50, 49, 50, 49] * 20 + [47, 49, 48, 50, 46] * 20 + [50, 50, 49, 50, 49] * 20
    for step, number in enumerate(right, start=1):
        log(alerts, step, mean_token_accuracy=number / 50, supervised_tokens=50 * step)
    assert [one["step"] for one in read_alerts(tmp_path / "alerts.jsonl")] == [20]


def test_a_rising_loss_of_held_out_rows_is_told(tmp_path: Path) -> None:
    alerts = Alerts(tmp_path / "alerts.jsonl", "one")
    for step, loss in enumerate([2.0, 1.5, 1.55, 1.6, 1.7, 1.4, 1.5]):
        log(alerts, step, eval_loss=loss)
    told = [(one["step"], one["message"]) for one in read_alerts(tmp_path / "alerts.jsonl")]
    rise = "the loss of held-out rows has risen from"
    assert told == [(3, f"{rise} 1.5000 to 1.6000"), (6, f"{rise} 1.4000 to 1.5000")]


def test_a_stage_that_goes_on_knows_what_was_told_and_what_was_lowest(tmp_path: Path) -> None:
    """Wherever it is stopped: the log that its checkpoint keeps tells, and nothing of it is told again."""
    losses = [1.0, 1.04, 1.2, 1.3, 1.0, 1.1]
    accuracies = [0.5, 0.995, 0.98, 1.0, 0.9, 0.99]
    lines = [
        {"eval_loss": loss, "mean_token_accuracy": accuracy, "supervised_tokens": 600 * (step + 1), "step": step}
        for step, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True))
    ]

    def told(name: str, stops: set[int]) -> list[tuple[int, str]]:
        path = tmp_path / name
        alerts = Alerts(path, "one")
        for step, line in enumerate(lines):
            if step in stops:
                alerts = Alerts(path, "one")
                alerts.on_train_begin(None, SimpleNamespace(log_history=lines[:step]), None)  # type: ignore[arg-type]
            log(alerts, step, **{key: value for key, value in line.items() if key != "step"})
        return [(one["step"], one["message"]) for one in read_alerts(path)]

    straight = told("straight", set())
    assert (2, "the loss of held-out rows has risen from 1.0000 to 1.2000") in straight and len(straight) == 3
    for stop in range(1, 6):
        assert told(f"stopped-{stop}", {stop}) == straight
    assert told("each", set(range(6))) == straight


@pytest.mark.parametrize("threshold", [0.9, 1e-6])
def test_a_threshold_that_no_token_reaches_is_told(
    tmp_path: Path, threshold: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights find each of 96 words about as likely as any other."""
    train = {"max_steps": 3, "loss": {"type": "threshold", "threshold": threshold}}
    _, paths = train_toy(tmp_path, train, model=tiny_sambay())
    lines = [line for line in read_metrics(paths.metrics("one")) if "loss" in line]
    assert all((line["loss"] == line["grad_norm"] == 0) == (threshold > 0.5) for line in lines) and len(lines) == 3
    told = [(one["step"], one["kind"]) for one in read_alerts(paths.alerts)]
    assert told == ([(1, "idle")] if threshold > 0.5 else [])
    assert ("one: loss and gradient are 0, so nothing is learned" in capsys.readouterr().err) == bool(told)


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "alerts.jsonl"
    Alerts(path, "one")("diverging", 3, "why")
    path.write_text(path.read_text() + '{"time": "20')
    assert [one["step"] for one in read_alerts(path)] == [3]
    assert read_alerts(tmp_path / "none.jsonl") == []
    with pytest.raises(ValueError, match="none of diverging"):
        Alerts(path, "one")("odd", 3, "why")


def test_a_place_that_takes_no_line_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Alerts(tmp_path / "no/folder/alerts.jsonl", "one")("diverging", 3, "why")
    assert "the alert diverging can't be written" in capsys.readouterr().err
