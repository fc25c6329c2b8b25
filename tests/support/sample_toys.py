"""Evaluations as they lie on the disk, without a model having answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft.evaluate.metrics import summarize
from sft.evaluate.runner import sample_line
from sft.utils.files import sha256_file, write_sealed

SETTINGS = {"max_new_tokens": 512, "temperature": 0.6, "top_p": 0.95, "samples_per_problem": 4, "seed": 0}


def sample(problem: int, number: int, right: bool, **other: Any) -> dict[str, Any]:
    """One sample of the problem `problem`, whose answer is ten times as much."""
    gold = str(10 * problem)
    made = {
        "problem": problem,
        "sample": number,
        "id": f"p{problem}",
        "group": None,
        "steps": None,
        "question": f"Ten times {problem}?",
        "prompt": f"<|user|>Ten times {problem}?",
        "completion": f"It is {gold if right else number}, I say.",
        "tokens": 20 + number,
        "finished": True,
        "answer": gold if right else f"-{number + 1}",
        "gold": gold,
        "verdict": "right" if right else "wrong",
        "reason": "same number",
    }
    return {**made, **other}


def samples_of(outcomes: Sequence[Sequence[bool]], **other: Any) -> list[dict[str, Any]]:
    """The samples of problems 0, 1, ...: which of them are right."""
    return [
        sample(problem, number, right, **other)
        for problem, rights in enumerate(outcomes)
        for number, right in enumerate(rights)
    ]


def write_samples(folder: Path, samples: Sequence[dict[str, Any]], settings: Mapping[str, Any] = SETTINGS) -> Path:
    """A suite's folder as a finished evaluation leaves it; returns its samples file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "samples.jsonl"
    path.write_text("".join(map(sample_line, samples)), encoding="utf-8")
    metrics = {"key": "k", "content": sha256_file(path), **summarize(samples), "settings": dict(settings)}
    write_sealed(folder / "metrics.json", {**metrics, "dtype": "float32"})
    write_sealed(folder / "progress.json", {"key": "k"})
    return path
