"""Judge recorded samples again, without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft.answers.judge import Judge
from sft.evaluate.metrics import summarize
from sft.evaluate.runner import forget_timeout, read_samples, write_samples
from sft.evaluate.verdicts import Sample, judged_again
from sft.utils.errors import UserError
from sft.utils.files import read_sealed, sha256_file, write_sealed

_NEEDED = {"problem", "sample", "group", "steps", "question", "prompt", "completion", "tokens", "finished", "gold"}
Progress = Callable[[str, int, int, int], None]


def rescore(
    folder: Path, *, timeout: float | None = None, workers: int = 2, progress: Progress | None = None
) -> dict[str, Any]:
    """Judge the samples of the finished evaluation in `folder` again; returns its metrics, both files written anew.

    What the metrics say of the generation stays; `rescored` says how many verdicts are others now.

    Args:
        timeout: seconds that the check of an answer may take; default: as many as the metrics say.
        workers: processes that check answers.
        progress: called with (suite, samples done, samples in all, right ones so far).

    Raises UserError for samples that aren't those of the metrics, and for those of a version that recorded less.
    """
    metrics, samples = _read(folder)
    settings: dict[str, Any] = metrics["settings"]
    within: float = settings["verify_timeout"] if timeout is None else timeout
    again: list[Sample] = []
    right = 0
    with Judge(within, workers) as judge:
        for sample in judged_again(judge, samples):
            again.append(sample)
            right += sample["verdict"] == "right"
            if progress is not None:
                progress(folder.name, len(again), len(samples), right)
    changed = sum(new["verdict"] != old["verdict"] for new, old in zip(again, samples, strict=True))
    forget_timeout(folder)
    write_samples(folder / "samples.jsonl", again)
    content, settings = sha256_file(folder / "samples.jsonl"), {**settings, "verify_timeout": within}
    found = {**metrics, **summarize(again), "settings": settings, "content": content, "rescored": changed}
    write_sealed(folder / "metrics.json", found)
    return found


def _read(folder: Path) -> tuple[dict[str, Any], list[Sample]]:
    """The metrics, and the samples that they were made of. Each line holds a sum of itself."""
    metrics, samples = read_sealed(folder / "metrics.json"), read_samples(folder / "samples.jsonl")
    if metrics is None or "verify_timeout" not in metrics.get("settings", {}):
        raise UserError(f"{folder / 'metrics.json'} can't be read: evaluate again.")
    if len(samples) != metrics.get("samples"):
        raise UserError(
            f"{folder / 'samples.jsonl'} has {len(samples)} whole samples, not the {metrics.get('samples')} that "
            "metrics.json was made of: evaluate again."
        )
    missing = {key for sample in samples for key in _NEEDED - sample.keys()}
    if missing:
        lacks = ", ".join(sorted(missing))
        raise UserError(f"{folder / 'samples.jsonl'} has no {lacks}: an older version made it; evaluate again.")
    return metrics, samples
