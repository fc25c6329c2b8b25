"""`sft bench generate`: what it prints and writes, and what it refuses before it measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from run_toys import write_start

from sft.cli.bench import PRESETS
from sft.cli.main import main
from sft.generate.bench.workloads import WORKLOADS

TINY = ("--size", "tiny", "--device", "cpu", "--rounds", "1")
SMALL = (*TINY, "--prompt", "6", "--new", "5", "--requests", "2")


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["bench", "generate", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_table_and_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # on a narrow terminal some columns are left out
    out, figure = tmp_path / "new" / "found.json", tmp_path / "found.svg"
    assert main(["bench", "generate", *SMALL, "--out", str(out), "--figure", str(figure)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("parameters: engine 2.0M, own-generate 2.0M, llama 2.0M; float32; ")
    assert all(name in lines[1] for name in ("tokens/s", "engine is", "first token, ms", "ms a token", "seconds"))
    assert [line.split()[:6] for line in lines[2:]] == [
        ["2", "x", "(6", "+", "5)", side] for side in ("engine", "own-generate", "llama")
    ]
    found = json.loads(out.read_text())
    assert [row["side"] for row in found["rows"]] == ["engine", "own-generate", "llama"]
    assert found["parameters"]["llama"] == pytest.approx(found["parameters"]["engine"], rel=0.01)
    assert {"processor", "threads", "load", "packages"} <= set(found["machine"]) and found["dtype"] == "float32"
    assert "llama" in "".join(ElementTree.fromstring(figure.read_text()).itertext())


def test_sweeps_of_each_number(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        *TINY,
        "--prompt",
        "3",
        "9",
        "--new",
        "4",
        "--requests",
        "1",
        "2",
        "--beside",
        "none",
        "--dtype",
        "bfloat16",
    )
    found = told(capsys, *words)
    expected = [f"{requests} x ({prompt} + 4)" for requests in (1, 2) for prompt in (3, 9)]
    assert [row["what"] for row in found["rows"]] == expected and found["dtype"] == "bfloat16"


def test_the_papers_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, *TINY, "--protocol", "paper", "--prompt", "20", "--new", "44", "--requests", "1", "3")
    last = [row for row in found["rows"] if row["length"] is None]
    assert [(row["what"], row["side"]) for row in last] == [
        (f"{requests} x (20 + 44)", side) for requests in (1, 3) for side in ("engine", "llama")
    ]
    assert all(row["seconds"] > 0 and row["memory"] > 0 for row in last)
    assert {row["length"] for row in found["rows"]} == {20, 64, None}


def test_the_sweep_says_whether_what_is_claimed_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "sweep.svg"
    words = ["bench", "generate", *TINY, "--sweep", "--prompt", "20", "40", "80", "--figure", str(figure)]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0].startswith("engine, 1 at once: a token at the longest takes ")
    assert lines[1].startswith("engine, outside full attention, 1 at once: ") and lines[1].endswith(": at most 1.3)")
    assert lines[2].startswith("engine, time of prompts by length: R^2 ") and lines[2].endswith(": above 0.99)")
    assert "a prompt's first token" in "".join(ElementTree.fromstring(figure.read_text()).itertext())


def test_a_model_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_start(tmp_path / "model")
    words = (
        "--model",
        str(folder),
        "--device",
        "cpu",
        "--rounds",
        "1",
        "--prompt",
        "4",
        "--new",
        "3",
        "--requests",
        "1",
    )
    found = told(capsys, *words, "--beside", "own-generate")
    assert [row["side"] for row in found["rows"]] == ["engine", "own-generate"]


def test_the_presets_are_the_workloads() -> None:
    assert tuple(WORKLOADS) == PRESETS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: what; see"),
        (["generate", "--size", "big"], "argument --size: big is none of tiny, small, published, or parameters"),
        (["generate", "--size", "1000"], "no shape is known for 1,000 parameters"),
        (["generate", "--model", "./nosuch"], "--model: "),
        (["generate", "--workload", "short", "--new", "3"], "--new and --workload both say how long answers are"),
        (["generate", "--sweep", "--protocol", "paper"], "argument --protocol: not allowed with argument --sweep"),
        (["generate", "--sweep", "--new", "3"], "--new has no effect with --sweep"),
        (["generate", "--protocol", "paper", "--new", "3", "4"], "--protocol paper takes one --prompt and one --new"),
        (["generate", "--beside", "none", "llama"], "--beside none can't stand with other sides"),
        (["generate", "--beside", "llama-graph"], "--beside llama-graph measures steps"),
        (
            ["generate", "--sweep", "--beside", "llama-graph", "--device", "cpu"],
            "--beside llama-graph needs a CUDA device",
        ),
        (["generate", "--device", "tpu"], "argument --device: must be cpu, cuda or cuda:N, not tpu"),
        (["generate", "--device", "cuda:99"], "--device cuda:99: torch sees "),
        (["generate", "--requests", "0"], "argument --requests: must be at least 1, not 0"),
        (["generate", "--out", "."], "--out . can't be written: it is a folder"),
        (["generate", "--figure", "file/x.svg"], "--figure file/x.svg can't be written: "),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_measured(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    Path("file").touch()
    assert main(["bench", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"sft: {message}") and err.count("\n") == 1, err
