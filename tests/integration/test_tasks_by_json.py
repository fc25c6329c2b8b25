"""Fifteen tasks that people have, each by at most seven calls of which nothing but the JSON object is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import running_hub
from run_toys import small_recipe, write_problems

from sft.cli.main import main
from sft.recipe import resolved_yaml

MOST_CALLS = 7
Call = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of two stages, a row of it twice, with what it stands on."""
    root = tmp_path_factory.mktemp("tasks")
    recipe = small_recipe(root)
    rows = (root / "rows.jsonl").read_text()
    (root / "rows.jsonl").write_text(rows + rows.splitlines()[0] + "\n")
    text = resolved_yaml(recipe)
    assert "    steps: []\n" in text
    (root / "r.yaml").write_text(text.replace("    steps: []\n", "    steps: [{dedup: {by: text}}]\n", 1))
    return root


@pytest.fixture
def call(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """`sft WORDS --json` in that folder: the object that it tells."""
    monkeypatch.chdir(root)
    calls = []

    def run(*words: str, status: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        calls.append(words)
        assert main([words[0], "--json", *words[1:]]) == status
        found = json.loads(capsys.readouterr().out)
        assert isinstance(found, dict)
        return found

    yield run
    assert 1 <= len(calls) <= MOST_CALLS


def test_1_is_all_here_that_is_needed(call: Call) -> None:
    found = call("doctor")
    assert found["ok"] and {"torch", "disk"} <= {finding["what"] for finding in found["findings"]}


def test_2_a_recipe_to_begin_with(call: Call, tmp_path: Path) -> None:
    (chat,) = [entry for entry in call("recipes")["recipes"] if "chat data" in entry["title"]]
    file = call("recipes", "copy", chat["name"], str(tmp_path / "my.yaml"))["file"]
    assert "model_name_or_path" in Path(file).read_text()


def test_3_which_key_says_it_and_what_is_its_default(call: Call) -> None:
    assert "stages.train" in call("recipes", "keys")["sections"]
    keys = {key["key"]: key for key in call("recipes", "keys", "train")["keys"]}
    assert keys["learning_rate"]["type"] and keys["learning_rate"]["meaning"]


def test_4_a_mistake_is_found_by_its_line_and_mended(call: Call, root: Path) -> None:
    text = (root / "r.yaml").read_text()
    wrong = root / "wrong.yaml"
    wrong.write_text(text.replace("max_steps", "max_step", 1))
    (problem,) = call("run", "wrong.yaml", "--dry_run", status=2)["error"]["problems"]
    lines = wrong.read_text().splitlines()
    assert "max_step:" in lines[problem["line"] - 1]
    key = problem["message"].rpartition("did you mean ")[2].rstrip("?")
    lines[problem["line"] - 1] = lines[problem["line"] - 1].replace("max_step", key)
    wrong.write_text("\n".join(lines) + "\n")
    found = call("run", "wrong.yaml", "--dry_run")
    assert found["dry_run"] and found["plan"] and Path(found["resolved"]).is_file()


def test_5_what_fits_one_card(call: Call) -> None:
    (whole,) = [stage for stage in call("plan", "phi4-mini-flash", "--stage", "hard", "--gpus", "1xA100-80")["stages"]]
    assert whole["fits"] is False and whole["smallest"] is not None
    adapters = call("plan", "phi4-mini-flash/lora", "--stage", "hard", "--gpus", "1xA100-80")["stages"][0]
    assert adapters["memory_total"] < whole["memory_total"]


def test_6_how_many_rows_were_left_out_and_why(call: Call) -> None:
    stage = call("prepare", "r.yaml", "--stage", "a")["stages"]["a"]
    assert stage["rows"] == 17 and stage["documents"] == 16
    (lost,) = [step for step in stage["steps"] if step["step"] == "dedup"]
    assert lost["reasons"] == {"duplicate": 1}


def test_7_what_became_of_a_row(call: Call) -> None:
    story = call("prepare", "r.yaml", "--stage", "a", "--explain", "rows.jsonl:17")["stages"]["a"]["story"]
    assert any("dedup" in line for line in story)


def test_8_what_of_a_row_is_trained(call: Call) -> None:
    (row,) = call("preview", "r.yaml", "--stage", "a", "--row", "0")["stages"]["a"]["rows"]
    document = row["documents"][0]
    trained = "".join(part["text"] for part in document["text"] if part["kind"] == "trained")
    assert 0 < document["trained_tokens"] < document["tokens"] and trained.strip()


def test_9_a_model_is_trained_and_how_good_it_is(call: Call) -> None:
    found = call("run", "r.yaml")
    assert found["stages"]["b"]["steps"] == 3 and Path(found["stages"]["b"]["model"]).is_dir()
    assert 0 <= found["evaluations"]["b"]["sums"]["pass_at_1"] <= 1
    assert Path(found["report"]).is_file() and Path(found["export"]).is_dir() and found["alerts"] == []


def test_10_another_model_on_a_suite_of_ones_own(call: Call, root: Path) -> None:
    write_problems(root / "own.jsonl", 2)
    (root / "own.yaml").write_text("source: {path: own.jsonl}\ncolumns: {problem: question}\nmax_new_tokens: 4\n")
    found = call("eval", "--suite", "own.yaml", "--model", "start", "--output_dir", "own-results")
    ((suite, metrics),) = next(iter(found.values())).items()
    assert suite == "own" and metrics["problems"] == 2


def test_11_is_the_trained_model_better(call: Call) -> None:
    (comparison,) = call("compare", "run:start", "run:b")["comparisons"]
    assert comparison["suite"] == "sums" and comparison["pass_at_1"]["p"] is not None


def test_12_which_learning_rate_is_best(call: Call) -> None:
    words = ("sweep", "r.yaml", "--output_dir", "swept", "--stages.b.train.learning_rate", "1e-3,2e-3")
    assert len(call(*words, "--dry_run")["plan"]) >= 2
    found = call(*words)
    assert len(found["points"]) == 2 and found["best"]


def test_13_the_model_for_others_and_an_answer_of_it(call: Call, tmp_path: Path) -> None:
    folder = call("export", "r.yaml", "--out", str(tmp_path / "mine"))["folder"]
    found = call("chat", "--model", folder, "--prompt", "What is 1 + 2?", "--max_new_tokens", "3")
    assert set(found) == {"answer", "thinking", "tokens", "cut_off"} and found["tokens"] <= 3


def test_14_the_model_onto_the_hub(root: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "sft", "push", "r.yaml", "--repo_id", "tester/mine", "--json"]
    with running_hub(tmp_path / "hub") as hub:
        done = subprocess.run(
            words,
            cwd=root,
            env={**os.environ, **hub.environment(tmp_path / "home")},
            capture_output=True,
            text=True,
            timeout=300,
        )
        found = json.loads(done.stdout)
        assert done.returncode == 0, done.stderr
        assert found["verified"] and not found["public"] and found["commit"]
        assert "config.json" in hub.files(found["repo_id"])


def test_15_a_script_for_the_cluster(call: Call) -> None:
    words = ("--slurm", "--nodes", "2", "--gpus_per_node", "8", "--time", "1:00:00", "--", "run", "r.yaml")
    assert "#SBATCH --nodes=2" in call("launch", *words)["script"]
