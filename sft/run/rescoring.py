"""The finished evaluations of a run, or of a folder, judged again by `sft eval --rescore`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.evaluate.rescore import rescore
from sft.run.lock import lock
from sft.utils.errors import UserError
from sft.utils.files import read_sealed, write_sealed
from sft.utils.hashes import folder_hashes
from sft.utils.progress import ProgressLine
from sft.utils.say import say

if TYPE_CHECKING:
    from sft.recipe.schema import EvaluateSection, Recipe


def rescore_all(
    root: Path, *, recipe: Recipe | None = None, points: Collection[str] | None = None, suites: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """Judge what is recorded below `root` again; metrics by point and suite.

    Args:
        root: a run's folder, an evaluation's (suites in it), or a suite's.
        recipe: the run's, which says how long a check may take, and how many there are at once; None: as long as the
            metrics say.
        points: those that are meant; None: all.
        suites: those that are meant; empty: all.

    Raises UserError where there is no finished evaluation, or none of one of the suites.
    """
    found = [
        folder
        for folder in finished(root)
        if (points is None or folder.parent.name in points) and (not suites or folder.name in suites)
    ]
    gone = [name for name in suites if all(folder.name != name for folder in found)]
    if gone or not found:
        named = f" of {', '.join([*(points or ()), *gone])}" if points or gone else ""
        raise UserError(f"{root} has no finished evaluation{named}: nothing to judge again")
    results: dict[str, dict[str, Any]] = {}
    for folder in found:
        point = folder.parent.resolve().name
        with lock(folder.parent / ".lock", f"{point} is being evaluated by another command: wait for it."):
            section = None if recipe is None else _asked_by(recipe, point)
            results.setdefault(point, {})[folder.name] = _again(folder, point, section)
    return results


def finished(root: Path) -> Iterator[Path]:
    """The folders of suites below `root` whose evaluation is finished."""
    patterns = ("eval/*/*",) if (root / "eval").is_dir() else ("", "*", "*/*")
    for pattern in patterns:
        for folder in sorted(root.glob(pattern)) if pattern else [root]:
            if (folder / "samples.jsonl").is_file() and (folder / "metrics.json").is_file():
                yield folder


def _asked_by(recipe: Recipe, point: str) -> EvaluateSection:
    """The section that a point's answers are judged by: its stage's; the first one's at the start, the last one's for
    another model."""
    name = re.sub(r"(-limit-\d+)?(-samples-\d+)?$", "", point)
    own = {"start": recipe.stages[0], **{stage.name: stage for stage in recipe.stages}}
    return (own.get(point) or own.get(name) or recipe.stages[-1]).evaluate


def _again(folder: Path, point: str, section: EvaluateSection | None) -> dict[str, Any]:
    """The suite's metrics; where the point's manifest holds them, that is written anew too."""
    marker, suite = folder.parent / "manifest.json", folder.name
    manifest = read_sealed(marker) or {}
    mine = manifest.get("files", {}).get(suite) == folder_hashes(folder)
    line = ProgressLine(f"{point}/{suite}", "answers")

    def show(name: str, done: int, total: int, right: int) -> None:
        line(done, total, [f"{right / done:.1%} right"])

    if section is None:
        metrics = rescore(folder, progress=show)
    else:
        within, workers = section.verify_timeout, section.verify_workers
        metrics = rescore(folder, timeout=within, workers=workers, progress=show)
    if mine:
        manifest["metrics"][suite], manifest["files"][suite] = metrics, folder_hashes(folder)
        write_sealed(marker, manifest)
    say(f"{point}: {suite}: {metrics['rescored']} of {metrics['samples']} verdicts are others than before")
    return metrics
