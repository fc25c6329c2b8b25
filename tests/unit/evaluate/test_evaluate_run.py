"""Suites from data to metrics: what is written, what a second run looks up, and what a killed one continues."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sft.evaluate.metrics import summarize
from sft.evaluate.runner import evaluate, model_fingerprint, read_samples, write_samples
from sft.evaluate.suites import load_problems, render_prompt
from sft.recipe.schema import DataSection, DataSource, EvaluateSection, Source, SuiteSection
from sft.utils.errors import UserError
from sft.utils.files import read_sealed, sha256_file, sha256_json, write_sealed

HELPER = Path(__file__).with_name("chat_model_for_evaluation.py")


@pytest.fixture(scope="module")
def helper() -> ModuleType:
    import importlib.util

    spec = importlib.util.spec_from_file_location("chat_model_for_evaluation", HELPER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer(helper: ModuleType) -> Any:
    return helper.make_tokenizer()


@pytest.fixture(scope="module")
def model(helper: ModuleType, tokenizer: Any) -> Any:
    return helper.make_model(len(tokenizer))


@pytest.fixture(scope="module")
def data(helper: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helper.write_problems(tmp_path_factory.mktemp("data") / "sums.jsonl")


@pytest.fixture(scope="module")
def straight(
    helper: ModuleType, model: Any, tokenizer: Any, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """An evaluation that nothing interrupted: its metrics and its folder."""
    out = tmp_path_factory.mktemp("straight")
    metrics = evaluate(model, tokenizer, helper.make_section(data), prompt_defaults=None, out_dir=out, point="start")
    return metrics["sums"], out / "sums"


def lasting(metrics: dict[str, Any]) -> dict[str, Any]:
    """The part of the metrics that doesn't speak of time."""
    return {
        name: value
        for name, value in metrics.items()
        if name not in ("seconds", "tokens_per_second", "generated_tokens", "resumed_samples")
    }


def test_every_sample_is_recorded_and_the_metrics_follow_from_them(straight: tuple[dict[str, Any], Path]) -> None:
    metrics, folder = straight
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [(s["problem"], s["sample"]) for s in samples] == [(p, s) for p in range(24) for s in range(2)]
    assert {s["verdict"] for s in samples} == {"right", "wrong"}
    right = sum(s["verdict"] == "right" for s in samples)
    assert metrics["pass_at_1"] == pytest.approx(right / 48)
    assert metrics["dtype"] == "float32"
    assert metrics["problems"] == 24 and metrics["samples"] == 48
    assert metrics["interval"][0] < metrics["pass_at_1"] < metrics["interval"][1]
    assert set(metrics["by_group"]) == {"a", "b"} and set(metrics["by_steps"]) == {"3", "4", "5"}
    assert sum(group["samples"] for group in metrics["by_group"].values()) == 48
    assert metrics["cut_off"] == sum(not s["finished"] for s in samples) / 48
    assert metrics["tokens"]["all"]["mean"] == pytest.approx(sum(s["tokens"] for s in samples) / 48)
    assert all(s["tokens"] <= 40 and s["finished"] == (s["tokens"] < 40) for s in samples)
    assert samples[0]["prompt"] == "<|user|>add. 0 + 0<|end|><|assistant|>"
    assert samples[0]["question"] == "0 + 0"
    assert read_sealed(folder / "metrics.json") == metrics


def test_a_finished_evaluation_is_looked_up(
    helper: ModuleType,
    model: Any,
    tokenizer: Any,
    data: Path,
    straight: tuple[dict[str, Any], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    metrics, folder = straight
    monkeypatch.setattr("sft.generate.generate_batch", lambda *a, **k: pytest.fail("generated again"))
    # The batch size changes nothing about the samples.
    section = helper.make_section(data, batch_size=9)
    again = evaluate(model, tokenizer, section, prompt_defaults=None, out_dir=folder.parent, point="start")
    assert again["sums"] == metrics


PLACE = "start: sums: 48 answers in {folder} thrown away, to be made anew: "


@pytest.mark.parametrize("mark", ["of today", "of a version that noted less"])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"temperature": 0.5}, "another temperature (1.0, now 0.5)"),
        ({"max_new_tokens": 39}, "another max_new_tokens (40, now 39)"),
        ({"prompt_template": "{prompt}"}, "other problems or prompts"),
        ({"max_length": 60, "seed": 4}, "another max_length (None, now 60), another seed (3, now 4)"),
    ],
)
def test_other_settings_are_another_evaluation(
    helper: ModuleType,
    model: Any,
    tokenizer: Any,
    data: Path,
    straight: tuple[dict[str, Any], Path],
    copied: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    why: str,
    mark: str,
) -> None:
    """What answers are there is thrown away, and a line says so."""
    metrics = straight[0]
    if mark != "of today":
        write_sealed(copied / "progress.json", {"key": metrics["key"]})
        why = "another model or other problems" if "prompts" in why else why
    section = helper.make_section(data, **change)
    other = evaluate(model, tokenizer, section, prompt_defaults=None, out_dir=copied.parent, point="start")
    assert other["sums"]["key"] != metrics["key"] and other["sums"]["resumed_samples"] == 0
    assert [line for line in capsys.readouterr().err.splitlines() if "thrown" in line] == [
        PLACE.format(folder=copied) + why
    ]


@pytest.fixture
def copied(straight: tuple[dict[str, Any], Path], tmp_path: Path) -> Path:
    """The finished evaluation's folder, for a test to change."""
    return Path(shutil.copytree(straight[1], tmp_path / "sums"))


@pytest.mark.parametrize("state", ["finished", "under way", "of an earlier key", "under way, of an earlier key"])
def test_answers_are_kept_when_a_check_may_take_longer(
    helper: ModuleType,
    model: Any,
    tokenizer: Any,
    data: Path,
    straight: tuple[dict[str, Any], Path],
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
) -> None:
    """Their verdicts are made anew: here all of them were undecided, for a lack of time."""
    path, metrics, section = copied / "samples.jsonl", dict(straight[0]), helper.make_section(data)
    slow = [{**sample, "verdict": "undecided", "reason": "timeout"} for sample in read_samples(path)]
    write_samples(path, slow)
    metrics |= {"content": sha256_file(path)}
    within = 30.0
    if "earlier" in state:
        settings = {name: metrics["settings"][name] for name in EARLIER}
        metrics["key"] = earlier_key(helper, model, tokenizer, section, settings)
        write_sealed(copied / "progress.json", {"key": metrics["key"]})
    write_sealed(copied / "metrics.json", metrics)
    if "under way" in state:
        (copied / "metrics.json").unlink()
    monkeypatch.setattr("sft.generate.generate_batch", lambda *a, **k: pytest.fail("generated again"))
    again: dict[str, Any] = {}
    for seconds in (within, within, 2.0):
        asked = section.model_copy(update={"verify_timeout": seconds})
        again = evaluate(model, tokenizer, asked, prompt_defaults=None, out_dir=copied.parent, point="start")["sums"]
        assert again["key"] == straight[0]["key"] and again["settings"]["verify_timeout"] == seconds
        assert again["verdicts"] == straight[0]["verdicts"]
        assert path.read_bytes() == (straight[1] / "samples.jsonl").read_bytes()


EARLIER = ("max_new_tokens", "temperature", "top_p", "samples_per_problem", "seed", "verify_timeout")


def earlier_key(helper: ModuleType, model: Any, tokenizer: Any, section: Any, settings: dict[str, Any]) -> str:
    """The key that answers had when the time of a check was part of it."""
    from sft.evaluate.runner import VERSION
    from sft.models.end_tokens import end_token_ids

    suite, asked = section.suites[0], []
    for problem in load_problems(suite):
        ids = tokenizer(render_prompt(tokenizer, problem, suite, None), add_special_tokens=False)["input_ids"]
        asked.append([ids, problem.id, problem.gold, problem.group, problem.steps])
    ends = sorted(end_token_ids(tokenizer, model))
    return sha256_json([VERSION, model_fingerprint(model), settings, ends, sha256_json(asked)])


def test_verdicts_of_a_kill_between_samples_and_metrics_are_made_anew(
    helper: ModuleType, model: Any, tokenizer: Any, data: Path, straight: tuple[dict[str, Any], Path], copied: Path
) -> None:
    from sft.evaluate import rescore

    metrics = (copied / "metrics.json").read_bytes()
    rescore.rescore(copied, timeout=30.0)
    (copied / "metrics.json").write_bytes(metrics)
    path = copied / "samples.jsonl"
    write_samples(path, [{**sample, "verdict": "undecided"} for sample in read_samples(path)])
    section = helper.make_section(data)
    again = evaluate(model, tokenizer, section, prompt_defaults=None, out_dir=copied.parent, point="start")["sums"]
    assert again["verdicts"] == straight[0]["verdicts"]


def test_other_weights_are_another_model(helper: ModuleType, tokenizer: Any) -> None:
    import torch

    model = helper.make_model(len(tokenizer))
    before = model_fingerprint(model)
    assert model_fingerprint(helper.make_model(len(tokenizer))) == before
    with torch.no_grad():
        model.model.norm.weight[5] += 1e-6
    assert model_fingerprint(model) != before


def test_an_evaluation_killed_midway_gives_the_same_result(
    helper: ModuleType, model: Any, tokenizer: Any, data: Path, straight: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    path = tmp_path / "sums" / "samples.jsonl"
    process = subprocess.Popen([sys.executable, str(HELPER), str(data), str(tmp_path)])
    try:
        deadline = time.monotonic() + 120
        while not path.exists() or path.read_bytes().count(b"\n") < 10:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait(60)
    written = path.read_bytes().count(b"\n")
    assert 10 <= written < 48 and not (path.parent / "metrics.json").exists()
    metrics = evaluate(
        model, tokenizer, helper.make_section(data), prompt_defaults=None, out_dir=tmp_path, point="start"
    )["sums"]
    assert metrics["resumed_samples"] == written
    assert lasting(metrics) == lasting(straight[0])
    assert path.read_bytes() == (straight[1] / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("tear", [b'{"problem": 3, "sam', b"\x80\xff", b"null\n[1]\n{}\n"])
def test_torn_and_broken_lines_are_made_again(
    helper: ModuleType,
    model: Any,
    tokenizer: Any,
    data: Path,
    straight: tuple[dict[str, Any], Path],
    tmp_path: Path,
    tear: bytes,
) -> None:
    metrics, folder = straight
    target = tmp_path / "sums"
    target.mkdir(parents=True)
    (target / "progress.json").write_bytes((folder / "progress.json").read_bytes())
    lines = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    # A line that is there twice counts once.
    (target / "samples.jsonl").write_bytes(b"".join([*lines[:20], lines[3], tear]))
    assert len(read_samples(target / "samples.jsonl")) == 20
    again = evaluate(
        model, tokenizer, helper.make_section(data), prompt_defaults=None, out_dir=tmp_path, point="start"
    )["sums"]
    assert again["resumed_samples"] == 20 and lasting(again) == lasting(metrics)
    assert (target / "samples.jsonl").read_bytes() == b"".join(lines)


def suite(path: Path, **changes: Any) -> SuiteSection:
    return SuiteSection(**{"name": "s", "source": Source(path=str(path)), **changes})


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_gold_and_groups_are_found_in_the_usual_columns(tmp_path: Path) -> None:
    gsm8k = write_rows(tmp_path / "a.jsonl", {"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"})
    assert [(p.text, p.gold, p.id) for p in load_problems(suite(gsm8k))] == [("1+1?", "2", "a.jsonl:1")]
    row = {"problem": "x?", "solution": r"\boxed{3}", "answer": "3", "subject": "Algebra", "unique_id": "t/1"}
    math = load_problems(suite(write_rows(tmp_path / "b.jsonl", row)))[0]
    assert (math.gold, math.group, math.id) == ("3", "Algebra", "t/1")
    row = {"prompt": "p", "completion": r"<think>1</think>\boxed{4}", "family": "words", "steps": 5}
    own = load_problems(suite(write_rows(tmp_path / "c.jsonl", row)))[0]
    assert (own.gold, own.group, own.steps) == ("4", "words", 5)
    named = load_problems(suite(tmp_path / "b.jsonl", columns={"answer": "solution", "group": "answer"}))[0]
    assert (named.gold, named.group) == ("3", "3")


def test_generated_problems_have_answers_groups_and_steps() -> None:
    source = Source.model_validate({"generate": {"family": "all", "rows": 12, "split": "test"}})
    problems = load_problems(SuiteSection(name="g", source=source, max_problems=9))
    assert len(problems) == 9
    assert all(problem.gold and problem.group and problem.steps and problem.steps >= 3 for problem in problems)


def test_real_test_sets_load_whole(shared_dir: Path) -> None:
    gsm8k = load_problems(suite(shared_dir / "data" / "gsm8k" / "test.jsonl"))
    assert len(gsm8k) == 1319 and gsm8k[0].gold == "18"
    assert len(load_problems(suite(shared_dir / "data" / "math500" / "test.jsonl"))) == 500


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"text": "x"}], {}, "no column is the problem"),
        ([{"question": "x"}], {}, "no column is the answer"),
        ([{"question": "x", "answer": ""}], {}, r"a.jsonl:1: column 'answer' \(answer\) is empty"),
        ([{"question": "x", "answer": "1"}, {"question": ["y"], "answer": "1"}], {}, "a.jsonl:2: column 'question'"),
        ([{"question": "x", "answer": "1"}], {"columns": {"answer": "gold"}}, "no column 'gold'"),
        ([{"question": "x", "answer": "1", "steps": "many"}], {}, "not a whole number"),
        ([{"question": "x", "answer": "1"}, "broken"], {}, "a.jsonl:2"),
        ([], {}, "rows"),
    ],
)
def test_unusable_data_is_told_by_place(tmp_path: Path, rows: list[Any], changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join((json.dumps(row) if row != "broken" else '{"question":') + "\n" for row in rows))
    with pytest.raises(UserError, match=message):
        load_problems(suite(path, **changes))


def test_prompts_are_rendered_with_the_stage_templates_unless_the_suite_has_its_own(tokenizer: Any) -> None:
    from sft.evaluate.suites import Problem

    problem = Problem("1", "a {x} b", "1", None, None)
    sources = [DataSource(path="x")]
    defaults = DataSection(sources=sources, prompt_template=r"in \boxed{}. {prompt}", system_prompt="be.")
    bare = SuiteSection(name="s", source=Source(path="x"))
    own = SuiteSection(name="s", source=Source(path="x"), prompt_template="q {prompt}", system_prompt="no.")
    end = "<|end|><|assistant|>"
    assert render_prompt(tokenizer, problem, bare, None) == "<|user|>a {x} b" + end
    assert render_prompt(tokenizer, problem, bare, defaults) == (
        r"<|system|>be.<|end|><|user|>in \boxed{}. a {x} b" + end
    )
    assert render_prompt(tokenizer, problem, own, defaults) == "<|system|>no.<|end|><|user|>q a {x} b" + end
    asks_nothing = SuiteSection(name="s", source=Source(path="x"), prompt_template="q")
    with pytest.raises(UserError, match="prompt_template"):
        render_prompt(tokenizer, problem, asks_nothing, defaults)


def test_a_file_in_the_way_is_told_and_what_was_done_is_kept(
    helper: ModuleType, model: Any, tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "sums").write_text("in the way")
    with pytest.raises(UserError, match="run the same command again"):
        evaluate(model, tokenizer, helper.make_section(data), prompt_defaults=None, out_dir=tmp_path, point="start")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; skips where mounting isn't allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, timeout=60
    )
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=60)


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(
    helper: ModuleType,
    model: Any,
    tokenizer: Any,
    data: Path,
    straight: tuple[dict[str, Any], Path],
    small_disk: Path,
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 50_000)
    section = helper.make_section(data)
    with pytest.raises(UserError, match="No space left on device"):
        evaluate(model, tokenizer, section, prompt_defaults=None, out_dir=small_disk, point="start")
    assert not (small_disk / "sums" / "metrics.json").exists()
    ballast.unlink()
    metrics = evaluate(model, tokenizer, section, prompt_defaults=None, out_dir=small_disk, point="start")["sums"]
    assert metrics["resumed_samples"] > 0 and lasting(metrics) == lasting(straight[0])


def test_no_suites_need_no_model() -> None:
    assert evaluate(None, None, EvaluateSection(), prompt_defaults=None, out_dir="nowhere", point="start") == {}


def test_undecided_counts_as_not_right_and_is_shown() -> None:
    verdicts = ["right", "wrong", "undecided", "right"]
    samples = [
        {
            "problem": i,
            "sample": 0,
            "group": None,
            "steps": None,
            "prompt": "",
            "completion": "4",
            "answer": "4",
            "verdict": verdict,
            "reason": "timeout",
            "tokens": i,
            "finished": True,
        }
        for i, verdict in enumerate(verdicts)
    ]
    metrics = summarize(samples)
    assert metrics["pass_at_1"] == 0.5 and metrics["verdicts"]["undecided"] == 1
    assert metrics["undecided_reasons"] == {"timeout": 1}
    assert summarize(samples[::-1]) == metrics


@pytest.mark.parametrize(
    ("prompt", "completion", "finished", "verdict"),
    [
        ("2+2?", r"<think>so</think>\boxed{4}", True, "right"),
        ("2+2?", r"<think>so \boxed{4}", False, "wrong"),
        ("2+2?", r"<think>so</think>\boxed{4} and", False, "wrong"),
        ("2+2?", r"\boxed{4}", False, "wrong"),
        ("2+2?", r"[THINK]so \boxed{4}", True, "wrong"),
        ("2+2?", r"<|channel|>analysis<|message|>\boxed{4}", True, "wrong"),
        ("2+2?<think>\n", r"so \boxed{4}", False, "wrong"),
        ("2+2?<think>\n", r"so \boxed{4}", True, "wrong"),
        ("2+2?<think>\n", r"so \boxed{5}</think>\boxed{4}", True, "right"),
        ("2+2?[THINK]", r"so \boxed{4}", True, "wrong"),
        ("2+2?[THINK]", r"so \boxed{5}[/THINK]\boxed{4}", True, "right"),
        ("2+2?<think>\n\n</think>\n\n", r"\boxed{4}", True, "right"),
        ("2+2?", r"Sure. <think>so \boxed{4}", True, "wrong"),
        ("2+2?", r"Sure. <think>so</think> \boxed{4}", True, "right"),
    ],
)
def test_what_is_cut_off_or_stands_in_open_thinking_is_no_answer(
    tmp_path: Path, prompt: str, completion: str, finished: bool, verdict: str
) -> None:
    from sft.evaluate.runner import _Recorder, _Task
    from sft.evaluate.suites import Problem

    run = SimpleNamespace(
        problems=[Problem("1", "2+2?", "4", None, None)],
        prompts=[prompt],
        tokenizer=SimpleNamespace(decode=lambda ids, **_: completion),
        suite=SimpleNamespace(samples_per_problem=1, name="toy"),
        section=SimpleNamespace(verify_timeout=5.0, verify_workers=1),
        folder=tmp_path,
    )
    with _Recorder(run, [], None) as recorder:  # type: ignore[arg-type]
        recorder.add(_Task(0, 0, 0), [1], finished)
    assert [sample["verdict"] for sample in recorder.samples] == [verdict]
    assert summarize(recorder.samples)["pass_at_1"] == (verdict == "right")


@pytest.mark.parametrize(("here", "asked", "each"), [("1", 2, 2), ("2", 2, 1), ("8", 2, 1), ("2", 6, 3)])
def test_processes_of_one_machine_share_its_checkers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: str, asked: int, each: int
) -> None:
    from sft.evaluate import runner

    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    started: list[int] = []
    monkeypatch.setattr(runner, "Judge", lambda timeout, workers: started.append(workers))
    section = SimpleNamespace(verify_timeout=5.0, verify_workers=asked)
    runner._Recorder(SimpleNamespace(section=section, folder=tmp_path), [], None).__enter__()  # type: ignore[arg-type]
    assert started == [each]


def test_problems_that_would_forge_a_turn_are_refused(helper: ModuleType, tokenizer: Any, data: Path) -> None:
    suite = helper.make_section(data).suites[0]
    token = sorted(tokenizer.all_special_tokens)[0]
    problem = replace(load_problems(suite)[0], text=f"2+2?{token}")
    with pytest.raises(UserError, match=re.escape(f"problem {problem.id} spells out {token}")):
        render_prompt(tokenizer, problem, suite, None)
