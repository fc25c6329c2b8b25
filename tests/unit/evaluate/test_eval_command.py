"""`sft eval` with suites, limits and samples of its own, with a recipe and without; limits that count the prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_toys import small_recipe, write_problems, write_start

from sft.cli.main import main
from sft.evaluate.runner import read_samples
from sft.recipe import RunPaths, resolved_yaml
from sft.utils.files import read_sealed

SUITE = """\
# Sums
source: {path: held.jsonl}
columns: {problem: question}
max_new_tokens: 4
"""


@pytest.fixture
def here(in_tmp: Path) -> Path:
    """A model, a suite's file and its problems."""
    write_start(in_tmp / "m1", seed=1)
    write_problems(in_tmp / "held.jsonl", 5, first=50)
    (in_tmp / "sums.yaml").write_text(SUITE)
    return in_tmp


def samples_of(folder: Path) -> list[tuple[int, int]]:
    return [(sample["problem"], sample["sample"]) for sample in read_samples(folder / "samples.jsonl")]


def test_suites_without_a_recipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "--suite", "sums.yaml", "--suite", "tiny", "--model", "m1", "--limit", "2", "--samples", "3"]
    words += ["--suites.tiny.max_new_tokens", "5", "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    point = "m1-limit-2-samples-3"
    assert list(told) == [point] and list(told[point]) == ["sums", "tiny"]
    for suite in ("sums", "tiny"):
        folder = here / "runs" / "eval" / point / suite
        assert samples_of(folder) == [(p, s) for p in range(2) for s in range(3)]
        assert told[point][suite] == read_sealed(folder / "metrics.json")
    assert told[point]["tiny"]["settings"]["max_new_tokens"] == 5
    assert set(told[point]["sums"]["majority_at_k"]) == {"2", "3"}
    # All problems have a folder of their own.
    assert main(["eval", "--suite", "sums.yaml", "--model", "m1", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["m1"]
    assert len(samples_of(here / "runs" / "eval" / "m1" / "sums")) == 5
    assert len(samples_of(here / "runs" / "eval" / point / "sums")) == 6


def test_what_is_there_is_looked_up_and_never_replaced_by_other_answers(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["eval", "--suite", "sums.yaml", "--model", "m1", "--output_dir", "out"]
    assert main(words) == 0
    before = (here / "out" / "sums" / "samples.jsonl").read_bytes()
    monkeypatch.setattr("sft.generate.generate_batch", lambda *a, **k: pytest.fail("generated again"))
    assert main([*words, "--suites.sums.batch_size", "2"]) == 0
    assert main([*words, "--limit", "2"]) == 1
    assert "out/sums holds answers with another max_problems: name another --output_dir" in capsys.readouterr().err
    write_start(here / "m2", seed=2)
    assert main([*words[:3], "--model", "m2", "--output_dir", "out"]) == 1
    assert "out holds answers of another model, m1: name another --output_dir" in capsys.readouterr().err
    assert (here / "out" / "sums" / "samples.jsonl").read_bytes() == before


def test_models_of_one_name_have_folders_of_their_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "--suite", "sums.yaml", "--json", "--model"]
    write_start(here / "other" / "m1", seed=2)
    told: dict[str, Any] = {}
    for model in ("m1", "other/m1", "m1"):
        assert main([*words, model]) == 0
        told |= json.loads(capsys.readouterr().out)
    assert sorted(told) == sorted(path.name for path in (here / "runs" / "eval").iterdir()) and len(told) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "sums.yaml"], "--suite without a recipe needs --model PATH"),
        (["--suite", "nothing", "--model", "m1"], "--suite nothing: nothing: no such suite file"),
        (["--suite", "gone.yaml", "--model", "m1"], "suite gone.source.path: gone.jsonl: no such file or folder"),
        (["--suite", "sums.yaml", "--model", "m1", "--limit", "0"], "--limit: must be at least 1, not 0"),
        (["--suite", "sums.yaml", "--model", "./gone"], "--model: "),
        (["--suite", "sums.yaml", "--model", "m1", "--suites.sum.top_p", "1"], "suites has no 'sum'; there are: sums"),
        (
            ["--suite", "sums.yaml", "--model", "m1", "--every.steps", "5"],
            "--every.steps has no effect without a recipe",
        ),
        (["--suite", "sums.yaml", "--model", "m1", "--every", "5 steps"], "--every has no effect without a recipe"),
        (
            ["--suite", "sums.yaml", "--model", "m1", "--before_first_stage", "true"],
            "--before_first_stage has no effect without a recipe, where no stage is trained: leave it out",
        ),
        (
            ["--suite", "sums.yaml", "--model", "m1", "--suites.sums.columns.answer", "nope", "--dry_run"],
            "suite sums: there is no column 'nope' (for answer); the columns are answer, question.",
        ),
        (["--model", "m1"], "no recipe is named"),
    ],
)
def test_wrong_usage_is_told(here: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    (here / "gone.yaml").write_text("source: {path: gone.jsonl}\n")
    assert main(["eval", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_a_rehearsal_without_a_recipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "--suite", "sums.yaml", "--model", "m1", "--suites.sums.max_length", "99", "--dry_run"]
    assert main([*words, "--limit", "2"]) == 0
    told = capsys.readouterr().err
    assert "eval: the model m1" in told
    assert "suite: sums: at most 2 problems of held.jsonl x 1 answer, greedy, up to 99 tokens with the prompt" in told


@pytest.mark.parametrize("which", [["--start"], ["--model", "m1"], ["--stage", "b"], []])
def test_a_rehearsal_reads_the_suites_that_are_chosen(
    here: Path, capsys: pytest.CaptureFixture[str], which: list[str]
) -> None:
    (here / "r.yaml").write_text(resolved_yaml(small_recipe(here)))
    (here / "void.jsonl").write_text('{"problem": "a", "answer": ""}\n')
    (here / "void.yaml").write_text("source: {path: void.jsonl}\n")
    assert main(["eval", "r.yaml", *which, "--suite", "void.yaml", "--dry_run"]) == 2
    assert "suite void: void.jsonl:1: column 'answer' (answer) is empty or no text: ''" in capsys.readouterr().err
    assert not (here / "run").exists()


def test_a_recipes_results_stay_beside_limits_and_other_suites(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small_recipe(here)
    paths = RunPaths(recipe)
    (here / "r.yaml").write_text(resolved_yaml(recipe))
    (here / "sums.yaml").write_text(SUITE + "name: others\n")
    assert main(["eval", "r.yaml", "--start"]) == 0
    marker = (paths.eval_dir("start") / "manifest.json").read_bytes()
    whole = (paths.eval_dir("start", "sums") / "samples.jsonl").read_bytes()
    capsys.readouterr()
    for words, point, suites in (
        (["--limit", "2"], "start-limit-2", ["sums"]),
        (["--samples", "2", "--suite", "sums"], "start-samples-2", ["sums"]),
        (["--suite", "sums.yaml"], "start", ["others"]),
        (["--suite", "sums"], "start", ["sums"]),
    ):
        assert main(["eval", "r.yaml", "--start", "--json", *words]) == 0
        told = json.loads(capsys.readouterr().out)
        assert list(told) == [point] and list(told[point]) == suites
        assert told[point][suites[0]] == read_sealed(paths.eval_dir(point, suites[0]) / "metrics.json")
    assert len(samples_of(paths.eval_dir("start-limit-2", "sums"))) == 2
    assert len(samples_of(paths.eval_dir("start-samples-2", "sums"))) == 6
    assert len(samples_of(paths.eval_dir("start", "others"))) == 3
    assert (paths.eval_dir("start") / "manifest.json").read_bytes() == marker
    assert (paths.eval_dir("start", "sums") / "samples.jsonl").read_bytes() == whole
    # A file whose suite is called as one of the recipe's would take its place.
    (here / "sums.yaml").write_text(SUITE + "name: sums\n")
    assert main(["eval", "r.yaml", "--start", "--suite", "sums.yaml"]) == 2
    assert "--suite sums.yaml: another suite is called sums already" in capsys.readouterr().err


def test_a_recipes_answers_are_kept_when_a_check_may_take_longer(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(here)
    folder = RunPaths(recipe).eval_dir("start", "sums")
    (here / "r.yaml").write_text(resolved_yaml(recipe))
    words, longer = ["eval", "r.yaml", "--start"], ["--stages.a.evaluate.verify_timeout", "30"]
    assert main(words) == 0
    samples = (folder / "samples.jsonl").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr("sft.generate.generate_batch", lambda *a, **k: pytest.fail("generated again"))
    for more, said in (
        (longer, "start: sums: judged again, as verify_timeout is another: 3 answers"),
        (longer, "start: evaluated already, skipped"),
        (["--rescore"], "start: sums: 0 of 3 verdicts are others than before"),
        ([], "start: evaluated already, skipped"),
        (["--stages.a.evaluate.verify_workers", "1"], "start: evaluated already, skipped"),
    ):
        assert main([*words, *more]) == 0
        assert said in capsys.readouterr().err
        assert (folder / "samples.jsonl").read_bytes() == samples
        metrics = read_sealed(folder / "metrics.json")
        assert metrics is not None and metrics["settings"]["verify_timeout"] == (30.0 if more == longer else 5.0)


def test_another_model_on_chosen_suites_of_a_recipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small_recipe(here)
    (here / "r.yaml").write_text(resolved_yaml(recipe))
    assert main(["eval", "r.yaml", "--model", "m1", "--suite", "sums", "--limit", "1", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["model-m1-limit-1"]
    assert samples_of(RunPaths(recipe).eval_dir("model-m1-limit-1", "sums")) == [(0, 0)]


def test_an_answer_may_take_what_its_prompt_leaves(here: Path) -> None:
    """Three prompts: one with room for the whole answer, one for a part of it, one for none."""
    from sft.tokenizers.tiny import build_tokenizer

    questions = ["What is 1 + 1?", "What is 1 + 1 + 1 + 1?", "What is 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1?"]
    rows = [{"question": question, "answer": "2"} for question in questions]
    (here / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", "--suite", "sums.yaml", "--model", "m1", "--output_dir", "out", "--suites.sums.temperature", "1"]
    assert main([*words, "--suites.sums.max_new_tokens", "12"]) == 0
    free = read_samples(here / "out" / "sums" / "samples.jsonl")
    tokenizer = build_tokenizer()
    lengths = [len(tokenizer(sample["prompt"], add_special_tokens=False)["input_ids"]) for sample in free]
    most = lengths[1] + 5
    assert lengths[0] + 5 < most < lengths[2]
    words[words.index("out")] = "cut"
    assert main([*words, "--suites.sums.max_new_tokens", "12", "--suites.sums.max_length", str(most)]) == 0
    cut = read_samples(here / "cut" / "sums" / "samples.jsonl")
    rooms = [min(12, max(0, most - length)) for length in lengths]
    assert rooms[1:] == [5, 0]
    for long, short, room in zip(free, cut, rooms, strict=True):
        ended = long["finished"] and long["tokens"] < room
        assert short["tokens"] == (long["tokens"] if ended else room) and short["finished"] == ended
        # The same numbers are drawn: what fits is the beginning of what would have been said.
        assert long["completion"].startswith(short["completion"])
    assert (cut[2]["completion"], cut[2]["verdict"], cut[2]["reason"]) == ("", "wrong", "cut off")
    metrics = read_sealed(here / "cut" / "sums" / "metrics.json")
    assert metrics is not None and metrics["settings"]["max_length"] == most
    assert metrics["cut_off"] == sum(not sample["finished"] for sample in cut) / 3
