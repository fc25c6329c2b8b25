"""Other models evaluated on a run's suites: each keeps its own results, whatever its folder is called."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_toys import small_recipe, write_start

from sft.recipe import RunPaths
from sft.report.collect import collect
from sft.run.evaluation import evaluate_other


def test_models_of_one_name_keep_their_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = RunPaths(small_recipe(tmp_path))
    first, second = write_start(tmp_path / "one" / "final", seed=1), write_start(tmp_path / "two" / "final", seed=2)
    one = evaluate_other(paths, str(first), None)
    samples = paths.eval_dir("model-final", "sums") / "samples.jsonl"
    before = samples.read_bytes()
    two = evaluate_other(paths, str(second), None)
    assert list(one) == ["model-final"] and list(two) != list(one)
    assert samples.read_bytes() == before
    run = collect(paths.recipe, paths)
    assert {*one, *two} <= set(run.points) and not {*one, *two} & set(run.own_points)
    # Both are looked up by now, under whatever path they are found.
    monkeypatch.setattr("sft.generate.generate_batch", lambda *a, **k: pytest.fail("generated again"))
    monkeypatch.chdir(tmp_path)
    assert evaluate_other(paths, "one/final", None) == one and evaluate_other(paths, "two/final", None) == two


def test_results_of_an_unknown_model_stay(tmp_path: Path) -> None:
    """Those of an older version don't say which model they are of."""
    paths = RunPaths(small_recipe(tmp_path))
    old = paths.eval_dir("model-final", "sums") / "samples.jsonl"
    old.parent.mkdir(parents=True)
    old.write_text("of some model\n")
    (point,) = evaluate_other(paths, str(write_start(tmp_path / "final")), None)
    assert point.startswith("model-final-") and old.read_text() == "of some model\n"
