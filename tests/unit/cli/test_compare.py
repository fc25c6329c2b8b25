"""`sft compare`: what its words mean, what it prints, and what it refuses."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from child_time import run_timed
from sample_toys import SETTINGS, sample, samples_of, write_samples

from sft.cli.main import main

EVALUATED = {"start": 0.2, "one": 0.5, "two": 0.8}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose stages `two` and `one` (in this order) were evaluated on two suites, the start on one."""
    rng = random.Random(0)
    for point, chance in EVALUATED.items():
        for suite in ("math", "words")[: 1 if point == "start" else 2]:
            outcomes = [[rng.random() < chance for _ in range(4)] for _ in range(20)]
            write_samples(tmp_path / "run" / "eval" / point / suite, samples_of(outcomes))
    (tmp_path / "run" / "resolved.yaml").write_text("stages: [{name: two}, {name: one}, {name: three}]\n")
    (tmp_path / "run" / "stages" / "one").mkdir(parents=True)
    return tmp_path / "run"


def told(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["compare", *map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    capsys.readouterr()
    status = main(["compare", *map(str, words)])
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("sft: ") and error.count("\n") == 1
    return f"{status}: {error[5:-1]}"


def test_names_mean_what_help_says(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = told(capsys, run / "eval" / "two", run / "eval" / "one")["comparisons"]
    assert [found["suite"] for found in plain] == ["math", "words"]
    for a in (f"{run}:two", f"{run}/eval/two/"):
        # A run is its last stage that is evaluated, in its recipe's order; `three` isn't yet.
        for b in (run, f"{run}/eval", f"{run}:one", run / "stages" / "one"):
            found = told(capsys, a, b)["comparisons"]
            assert [one["pass_at_1"] for one in found] == [one["pass_at_1"] for one in plain]
    file, folder = run / "eval" / "two" / "math" / "samples.jsonl", run / "eval" / "one" / "math"
    assert told(capsys, file, folder)["comparisons"][0]["pass_at_1"] == plain[0]["pass_at_1"]


def test_suites_of_one_alone_are_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = told(capsys, f"{run}:two", f"{run}:start")["left_out"]
    assert left == [{"suite": "words", "only_in": f"{run}:two", "not_in": f"{run}:start"}]
    assert main(["compare", f"{run}:start", f"{run}:two"]) == 0
    assert f"left out: suite words is in {run}:two, not in {run}:start" in capsys.readouterr().out


def test_all_are_compared_with_the_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, f"{run}:two", f"{run}:start", f"{run}:one")["comparisons"]
    assert [(one["b"].rpartition(":")[2], one["suite"]) for one in found] == [
        ("start", "math"),
        ("one", "math"),
        ("one", "words"),
    ]
    assert {one["a"] for one in found} == {f"{run}:two"}
    assert all(one["p_holm"] >= one["pass_at_1"]["p"] for one in found)
    assert found[0]["pass_at_1"]["difference"] < -0.4 and found[0]["p_holm"] < 0.001


def test_the_terminal_tells_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", f"{run}:start", f"{run}:two", "--detect", "0.1"]) == 0
    out = capsys.readouterr().out
    assert f"A  {run}:start\nB  {run}:two\n" in out and "math: 20 problems, samples: 80 of A and 80 of B" in out
    for word in ("pass@1", "majority@4", "cut off", "mean tokens", "<0.0001", "A difference of 10 points takes"):
        assert word in out
    found = told(capsys, f"{run}:start", f"{run}:two", "--detect", "0.1")["comparisons"][0]
    assert len(found["gained"]) > 5
    assert f"gained: {len(found['gained'])} problems, 5 of them (--json has all)" in out
    assert out.count("Right is ") == 5 + len(found["lost"])
    assert found["power"]["detect"]["size"] == 0.1 and found["power"]["detect"]["problems"] > 20
    value, (low, high) = found["pass_at_1"]["difference"], found["pass_at_1"]["interval"]
    assert f"{100 * value:+.1f}" in out and f"{100 * low:+.1f} to {100 * high:+.1f}" in out


def test_files_from_elsewhere_are_compared_by_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, verdicts in (("mine", "right right wrong"), ("theirs", "wrong right right")):
        rows = [
            {"question": f"{n}?", "gold": n, "verdict": verdict, "answer": "\x1b[2J"}
            for n, verdict in enumerate(verdicts.split())
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["compare", str(tmp_path / "mine.jsonl"), str(tmp_path / "theirs.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "mine and theirs: 3 problems" in out and "mean tokens" not in out
    # What a model says doesn't reach the terminal's ears.
    assert "\x1b" not in out and r"\x1b[2J" in out


def test_what_cant_be_compared_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = f"{run}:two"
    assert refused(capsys, two) == f"2: {two} is one evaluation: name what it is compared with, too"
    assert refused(capsys, two, run / "eval" / "two").startswith(f"2: {run}/eval/two is named twice")
    assert refused(capsys, two, tmp_path / "none").startswith(f"2: {tmp_path}/none: there is no such file or folder")
    assert refused(capsys, two, f"{run}:tow") == f"1: {run}:tow: tow is not evaluated, did you mean two?"
    assert refused(capsys, two, f"{run}:three").endswith("is not evaluated; there are one, start, two")
    assert "no evaluation is there" in refused(capsys, two, tmp_path)
    assert refused(capsys, two, "a", "--detect", "1").startswith("2: argument --detect: must be between 0 and 1")
    for size, told in (("abc", "a number, not abc"), ("nan", "between 0 and 1, not nan")):
        assert refused(capsys, two, "a", "--detect", size).startswith(f"2: argument --detect: must be {told}")
    assert refused(capsys, two, "").startswith("2: argument EVALUATION: the path is empty")
    (run / "eval" / "start" / "math").rename(run / "eval" / "start" / "other")
    assert refused(capsys, two, f"{run}:start") == (
        f"1: {two} (math, words) and {run}:start (other) have no suite in common"
    )
    (run / "resolved.yaml").unlink()
    (run / "eval" / "start").rename(run / "eval" / "model-x")
    assert refused(capsys, two, run) == (
        f"1: {run}: which of its evaluations is meant? Say {run}:model-x or {run}:one or {run}:two"
    )


def test_settings_that_differ_are_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_samples(run / "eval" / "one" / "math", samples_of([[True] * 4] * 20), {**SETTINGS, "temperature": 0.0})
    assert main(["compare", f"{run}:two", f"{run}:one"]) == 0
    assert "note: Not made alike: temperature 0.6 and 0: the difference is that of models" in capsys.readouterr().out


def test_the_published_protocols_are_compared_without_torch(tmp_path: Path) -> None:
    """MATH-500 with 8 samples and AIME with 64."""
    rng = random.Random(0)
    for point, gain in (("a", 0.0), ("b", 0.1)):
        for suite, problems, samples in (("math500", 500, 8), ("aime24", 30, 64)):
            chances = [min(1.0, rng.random() + gain) for _ in range(problems)]
            made = [
                sample(p, n, rng.random() < chance, answer=str(rng.randint(0, 999)), completion="so it is " * 100)
                for p, chance in enumerate(chances)
                for n in range(samples)
            ]
            write_samples(tmp_path / "eval" / point / suite, made)
    code = (
        "import sys; from sft.cli.main import main; status = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules); sys.exit(status)"
    )
    words = ["compare", f"{tmp_path}:a", f"{tmp_path}:b", "--detect", "0.01"]
    done, seconds = run_timed([sys.executable, "-c", code, *words])
    assert done.returncode == 0 and "math500: 500 problems" in done.stdout, done.stderr
    assert seconds < 20  # ten times what it may take on a quiet machine
