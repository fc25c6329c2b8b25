"""Recorded samples judged again: no model, the same verdicts; gold solutions are right, cut-off and empty ones not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft.cli.main import main
from sft.evaluate.rescore import rescore
from sft.evaluate.runner import read_samples, sample_line, write_samples
from sft.evaluate.suites import Problem, load_problems
from sft.evaluate.verdicts import Sample
from sft.recipe.suites import load_suites
from sft.utils.errors import UserError
from sft.utils.files import read_sealed, sha256_file, write_sealed
from sft.utils.hashes import folder_hashes

SETTINGS = {"max_new_tokens": 512, "temperature": 0.0, "samples_per_problem": 1, "verify_timeout": 5.0}


def sample_of(number: int, problem: Problem, completion: str, **changes: Any) -> Sample:
    """A sample as an evaluation records it, judged wrong for no reason."""
    return {
        "problem": number,
        "sample": 0,
        "id": problem.id,
        "group": problem.group,
        "steps": problem.steps,
        "question": problem.text,
        "options": problem.choices(),
        "prompt": f"<|user|>{problem.text}<|assistant|>",
        "completion": completion,
        "tokens": len(completion.split()),
        "finished": True,
        "answer": None,
        "gold": problem.gold,
        "verdict": "wrong",
        "reason": "not judged",
        **changes,
    }


def write_evaluation(folder: Path, samples: list[Sample], **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_samples(folder / "samples.jsonl", samples)
    content = sha256_file(folder / "samples.jsonl")
    metrics = {"key": "k", "content": content, "samples": len(samples), "settings": SETTINGS, "seconds": 9.0, **changes}
    write_sealed(folder / "metrics.json", metrics)
    return folder


@pytest.fixture(scope="module")
def math500(shared_dir: Path) -> tuple[list[Problem], list[str]]:
    """The problems as the suite reads them, and their solutions."""
    path = shared_dir / "data" / "math500" / "test.jsonl"
    suite = load_suites(["math500"], ["--suites.math500.source.path", str(path)]).suites[0]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return load_problems(suite), [row["solution"] for row in rows]


def test_math500_solutions_score_100_percent(math500: tuple[list[Problem], list[str]], tmp_path: Path) -> None:
    problems, solutions = math500
    texts = zip(problems, solutions, strict=True)
    samples = [sample_of(n, problem, f"<think>so</think>{text}") for n, (problem, text) in enumerate(texts)]
    found = rescore(write_evaluation(tmp_path / "math500", samples))
    wrong = [sample for sample in read_samples(tmp_path / "math500" / "samples.jsonl") if sample["verdict"] != "right"]
    assert wrong == [] and found["pass_at_1"] == 1.0 and found["problems"] == found["rescored"] == 500
    assert (found["cut_off"], found["empty"], found["thinking"]["closed"]) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("made", "finished", "share"),
    [
        (lambda text: text, False, "cut_off"),
        (lambda text: f"<think>so</think>{text}", False, "cut_off"),
        (lambda text: "", False, "cut_off"),
        (lambda text: "", True, "empty"),
        (lambda text: " \n", True, "empty"),
        (lambda text: f"<think>{text}</think>\n", True, "empty"),
        (lambda text: f"<think>{text}", True, "empty"),
    ],
)
def test_what_was_cut_off_or_says_nothing_scores_nothing_and_is_counted(
    math500: tuple[list[Problem], list[str]], tmp_path: Path, made: Any, finished: bool, share: str
) -> None:
    pairs = list(zip(*math500, strict=True))[::20]
    samples = [sample_of(n, problem, made(text), finished=finished) for n, (problem, text) in enumerate(pairs)]
    found = rescore(write_evaluation(tmp_path / "math500", samples))
    assert found["pass_at_1"] == 0.0 and found["verdicts"] == {"wrong": 25}
    assert {name: found[name] for name in ("cut_off", "empty")} == {"cut_off": 0.0, "empty": 0.0, share: 1.0}


def sums() -> list[Sample]:
    """One right, one wrong, one cut off; and verdicts that say otherwise."""
    problem = Problem("1", "2+2?", "4", "a", 3)
    return [
        sample_of(0, problem, r"\boxed{4}"),
        sample_of(1, problem, r"\boxed{5}", verdict="right", answer="4"),
        sample_of(2, problem, r"\boxed{4}", finished=False, verdict="right"),
    ]


def test_metrics_say_what_changed_and_keep_what_is_of_the_generation(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "sums", sums())
    found = rescore(folder)
    assert (found["rescored"], found["key"], found["seconds"]) == (3, "k", 9.0)
    assert found["pass_at_1"] == pytest.approx(1 / 3) and found == read_sealed(folder / "metrics.json")
    samples = read_samples(folder / "samples.jsonl")
    assert [s["verdict"] for s in samples] == ["right", "wrong", "wrong"]
    assert [s["answer"] for s in samples] == ["4", "5", None] and samples[2]["reason"] == "cut off"
    # Once more: nothing is new.
    text = (folder / "samples.jsonl").read_text()
    again = rescore(folder)
    assert again["rescored"] == 0 and (folder / "samples.jsonl").read_text() == text
    assert again == {**found, "rescored": 0}


def test_choices_are_judged_as_the_suite_listed_them(tmp_path: Path) -> None:
    listed = {"A": "x", "B": "vitamin A. It is so", "C": "y"}
    text = "Which?\n\nA) x\nB) vitamin A. It is so\nC) y"
    samples = [sample_of(0, Problem("1", text, "B", None, None, listed), r"\boxed{\text{vitamin A. It is so}}")]
    assert rescore(write_evaluation(tmp_path / "gpqa", samples))["pass_at_1"] == 1.0


def test_samples_that_are_not_those_of_the_metrics_are_refused(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "sums", sums())
    path = folder / "samples.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace('boxed{5}"', 'boxed{4}"'))
    with pytest.raises(UserError, match=r"has 2 whole samples, not the 3 that metrics\.json was made of"):
        rescore(folder)
    old = [{key: value for key, value in sample.items() if key != "question"} for sample in sums()]
    path.write_text("".join(map(sample_line, old)))
    with pytest.raises(UserError, match="has no question: an older version made it"):
        rescore(folder)
    (folder / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match=r"metrics\.json can't be read"):
        rescore(folder)


# ---- the command ----


def run_with_evaluations(root: Path) -> Path:
    """A run's recipe beside its folder, which has two points; the manifest of one holds the metrics."""
    for point in ("start", "one"):
        write_evaluation(root / "run" / "eval" / point / "sums", sums())
    folder = root / "run" / "eval" / "one"
    metrics, files = read_sealed(folder / "sums" / "metrics.json"), folder_hashes(folder / "sums")
    write_sealed(folder / "manifest.json", {"key": "m", "metrics": {"sums": metrics}, "files": {"sums": files}})
    recipe = root / "r.yaml"
    recipe.write_text(
        "name: r\noutput_dir: run\nmodel: {tokenizer: tiny, config: {}}\n"
        "stages: [{name: one, data: {sources: [{path: a.jsonl}]}}]\n"
    )
    return recipe


def test_a_runs_evaluations_are_judged_again(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_with_evaluations(in_tmp)
    assert main(["eval", "r.yaml", "--rescore", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {point: list(suites) for point, suites in told.items()} == {"start": ["sums"], "one": ["sums"]}
    assert told["one"]["sums"]["rescored"] == 3
    # The point's manifest goes on saying what is there: the run needn't evaluate again.
    folder = in_tmp / "run" / "eval" / "one"
    manifest = read_sealed(folder / "manifest.json")
    assert manifest is not None and manifest["metrics"] == told["one"]
    assert manifest["key"] == "m" and manifest["files"]["sums"] == folder_hashes(folder / "sums")


def test_the_recipe_says_how_long_a_check_may_take(in_tmp: Path) -> None:
    run_with_evaluations(in_tmp)
    write_evaluation(in_tmp / "run" / "eval" / "one-limit-2" / "sums", sums())

    def times() -> dict[str, float]:
        points = ("start", "one", "one-limit-2")
        files = {point: in_tmp / "run" / "eval" / point / "sums" / "metrics.json" for point in points}
        return {point: (read_sealed(file) or {})["settings"]["verify_timeout"] for point, file in files.items()}

    assert main(["eval", "r.yaml", "--rescore", "--stages.one.evaluate.verify_timeout", "30"]) == 0
    assert times() == {"start": 30.0, "one": 30.0, "one-limit-2": 30.0}
    # A folder has no recipe: as the metrics say.
    assert main(["eval", "run", "--rescore"]) == 0
    assert times() == {"start": 30.0, "one": 30.0, "one-limit-2": 30.0}
    (in_tmp / "r.yaml").write_text(
        "name: r\noutput_dir: run\nmodel: {tokenizer: tiny, config: {}}\nstages:\n"
        "  - {name: zero, data: {sources: [{path: a.jsonl}]}, evaluate: {verify_timeout: 7.0}}\n"
        "  - {name: one, data: {sources: [{path: a.jsonl}]}, evaluate: {verify_timeout: 8.0}}\n"
    )
    assert main(["eval", "r.yaml", "--rescore"]) == 0
    assert times() == {"start": 7.0, "one": 8.0, "one-limit-2": 8.0}


@pytest.mark.parametrize(
    ("words", "points"),
    [
        (["r.yaml", "--stage", "one"], {"one"}),
        (["--config", "r.yaml", "--start"], {"start"}),
        (["r.yaml", "--start", "--stage", "one"], {"start"}),
        (["run"], {"start", "one"}),
        (["run", "--suite", "sums"], {"start", "one"}),
        (["run/eval/one"], {"one"}),
        (["run/eval/one/sums"], {"one"}),
        (["--output_dir", "run/eval"], {"start", "one"}),
        (["r.yaml", "--output_dir", "run"], {"start", "one"}),
    ],
)
def test_folders_points_and_suites(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], words: list[str], points: set[str]
) -> None:
    run_with_evaluations(in_tmp)
    assert main(["eval", "--rescore", "--json", *words]) == 0
    assert set(json.loads(capsys.readouterr().out)) == points


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["run", "--suite", "other"], 1, "run has no finished evaluation of other: nothing to judge again"),
        (["run", "--limit", "3"], 2, "--limit has no effect with --rescore"),
        (["run", "--model", "."], 2, "--model has no effect with --rescore"),
        (["run", "--num_processes", "2"], 2, "--num_processes has no effect with --rescore"),
        (["r.yaml", "--trust_remote_code"], 2, "--trust_remote_code has no effect with --rescore"),
        (
            ["r.yaml", "--stages.one.train.max_steps", "2"],
            2,
            "--stages.one.train.max_steps has no effect with --rescore",
        ),
        (["r.yaml", "--name=x"], 2, "--name has no effect with --rescore, which judges the answers that are there"),
        (["two.yaml", "--start", "--stage", "two"], 2, "--start asks the suites of the first stage: leave --stage out"),
        (["run", "--start", "--stage", "one"], 2, "--start asks the suites of the first stage: leave --stage out"),
        (["run", "--suite", "sums", "--suite", "other"], 1, "run has no finished evaluation of other"),
        (["run", "--name", "x"], 2, "--name has no effect: run is a folder of results"),
        (["nothing"], 2, "nothing: no such recipe file"),
        (["--output_dir", "nothing"], 2, "nothing: no such folder"),
        ([], 2, "no recipe is named"),
    ],
)
def test_what_cannot_be_judged_is_told(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, message: str
) -> None:
    text = run_with_evaluations(in_tmp).read_text()
    (in_tmp / "two.yaml").write_text(text.replace("}]\n", "}, {name: two, data: {sources: [{path: a.jsonl}]}}]\n"))
    assert main(["eval", "--rescore", *words]) == status
    assert message in capsys.readouterr().err
