"""A data set's folder on disk stands for its files, split by split, as on the Hub."""

from __future__ import annotations

from pathlib import Path

from sft.recipe.schema import Recipe, Source

SUFFIXES = (".jsonl", ".parquet")


def narrow_to_splits(recipe: Recipe) -> Recipe:
    """Replace a source's local folder by the file of its split, where the folder has one (`train.jsonl`).

    So `--variables.gsm8k ./gsm8k` switches training and evaluation from the Hub to a folder in one go, and a folder
    that holds `train.jsonl` and `test.jsonl` is never trained on whole.
    """
    for stage in recipe.stages:
        for source in [*stage.data.sources, *(suite.source for suite in stage.evaluate.suites)]:
            _narrow(source)
    return recipe


def _narrow(source: Source) -> None:
    if source.path is None or not Path(source.path).is_dir():
        return
    for suffix in SUFFIXES:
        for pattern in (f"{source.split}{suffix}", f"{source.split}-*{suffix}"):
            if any(Path(source.path).glob(pattern)):
                source.path = str(Path(source.path) / pattern)
                return
