"""What counts as done, the same or unharmed follows from content: never from names, sizes or dates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_toys import copy_run, results_of, small_recipe, write_problems, write_start
from torch import Tensor
from train_toys import saved_weights

import sft.run.chain
from sft.hub.reload import ReloadReport
from sft.recipe import Recipe, RunPaths
from sft.run.chain import run
from sft.run.publish import export_stage
from sft.utils.errors import UserError


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The root of a finished run with its export, and what run() returned."""
    root = tmp_path_factory.mktemp("finished")
    recipe = small_recipe(root)
    result = run(recipe)
    export_stage(RunPaths(recipe), reuse=True)
    return root, result


@pytest.fixture
def again(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> Recipe:
    """The recipe of a copy of that run."""
    return small_recipe(copy_run(finished[0], tmp_path / "copy"))


@pytest.fixture
def nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft.run.chain, "train_stage", lambda *a, **k: pytest.fail("trained again"))


def test_a_run_that_was_moved_is_still_done(again: Recipe, finished: Any, nothing_is_trained: None) -> None:
    """Other paths and dates, the same content."""
    assert results_of(run(again)) == results_of(finished[1])


def test_another_start_of_the_same_shapes_is_another_run(again: Recipe, tmp_path: Path) -> None:
    start = Path(str(again.model.model_name_or_path))
    shutil.rmtree(start)
    write_start(start, seed=1)
    with pytest.raises(UserError, match=r"Stage a is done, but with other settings: start\.files\.model\.safetensors"):
        run(again)


def test_a_start_by_another_name_is_the_same(again: Recipe, nothing_is_trained: None) -> None:
    start = Path(str(again.model.model_name_or_path))
    start.rename(start.with_name("renamed"))
    again.model.model_name_or_path = str(start.with_name("renamed"))
    run(again)


def test_a_hub_model_whose_commit_moved_is_another_start(again: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    again.model.model_name_or_path = "someone/model"
    again.stages = again.stages[:1]
    shutil.rmtree(RunPaths(again).root)
    commits = iter(["a" * 40, "b" * 40])
    start = str(RunPaths(again).root.parent / "start")

    def as_at(commit: str) -> None:
        monkeypatch.setattr("sft.models.identity.resolved_commit", lambda *names: commit)
        local = small_recipe(Path(start).parent).model
        monkeypatch.setattr("sft.train.handover.load_start", lambda paths, dtype, **options: _loaded(local, dtype))
        monkeypatch.setattr("sft.run.start.load_start", lambda paths, dtype, **options: _loaded(local, dtype))
        monkeypatch.setattr("sft.run.chain.start_tokenizer", lambda section: _loaded(local, "float32")[1])
        # The Hub isn't asked whether it is there, nor for its tokenizer.
        asking = ("sft.models.identity.check_there", "sft.run.checks.check_named", "sft.tokenizers.load.check_named")
        for name in asking:
            monkeypatch.setattr(name, lambda *names, **options: None)

    as_at(next(commits))
    run(again)
    as_at(next(commits))
    with pytest.raises(UserError, match=r"start\.commit was a+, is now b+.*model_revision: a{40}"):
        run(again)


def _loaded(section: Any, dtype: str) -> tuple[Any, Any]:
    from sft.models.load import load_model
    from sft.tokenizers.load import start_tokenizer

    tokenizer = start_tokenizer(section)
    return load_model(section.model_copy(update={"dtype": dtype}), tokenizer), tokenizer


def test_a_suite_whose_file_was_replaced_is_evaluated_again(again: Recipe, finished: Any) -> None:
    root = RunPaths(again).root.parent
    write_problems(root / "held.jsonl", 3, first=70)
    result = run(again)
    before = finished[1]["evaluations"]
    assert all(result["evaluations"][point]["sums"]["key"] != before[point]["sums"]["key"] for point in before)


# ---- sixty damaged files ----

FILES = {
    "start's samples": "eval/start/sums/samples.jsonl",
    "start's metrics": "eval/start/sums/metrics.json",
    "start's progress": "eval/start/sums/progress.json",
    "start's marker": "eval/start/manifest.json",
    "stage's weights": "stages/a/final/model.safetensors",
    "stage's config": "stages/a/final/config.json",
    "stage's tokenizer": "stages/b/final/tokenizer.json",
    "stage's manifest": "stages/a/manifest.json",
    "packed rows": "prepared/*/rows-00000.arrow",
    "prepared manifest": "prepared/*/manifest.json",
    "export's weights": "export/model.safetensors",
    "export's config": "export/config.json",
    "export's manifest": "export/manifest.json",
    "export's note": "export.json",
    "run's manifest": "manifest.json",
    "resolved recipe": "resolved.yaml",
}


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    """One bit in the middle; in a text file a digit where there is one, so that it still parses."""
    content = bytearray(path.read_bytes())
    digits = [i for i, byte in enumerate(content) if 48 <= byte <= 57 and path.suffix in (".json", ".jsonl", ".yaml")]
    content[digits[len(digits) // 2] if digits else len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def deleted(path: Path) -> None:
    path.unlink()


def replaced(path: Path) -> None:
    """By a file of another kind that parses."""
    path.write_text('["foreign"]\n' if path.suffix != ".safetensors" else "foreign", encoding="utf-8")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that no longer lie in the file they came from."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("damage", [truncated, emptied, flipped, deleted, replaced, a_folder])
@pytest.mark.parametrize("kind", FILES)
def test_damage_is_rebuilt_or_refused_and_never_used(
    kind: str,
    damage: Callable[[Path], None],
    again: Recipe,
    finished: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The reload in a clean process has tests of its own, and takes seconds.
    whole = ReloadReport(1, 1, True, 0.0, None)
    monkeypatch.setattr("sft.hub.export.check_against", lambda *folder, **inputs: whole)
    paths = RunPaths(again)
    weights = {name: copies(saved_weights(paths.final_dir(name))) for name in "ab"}
    exported = copies(saved_weights(paths.export))
    for path in sorted(paths.root.glob(FILES[kind])):
        damage(path)
    try:
        result = run(again)
        if "export" in kind:
            export_stage(paths, reuse=True)
    except UserError as error:
        assert "\n" not in str(error) and ("--restart" in str(error) or str(paths.root) in str(error)), error
        return
    assert results_of(result) == results_of(finished[1])
    for name, tensors in weights.items():
        assert all(tensor.equal(tensors[key]) for key, tensor in saved_weights(paths.final_dir(name)).items())
    assert all(tensor.equal(exported[key]) for key, tensor in saved_weights(paths.export).items())
    assert json.loads(paths.manifest.read_text())["stages"].keys() == {"a", "b"}
