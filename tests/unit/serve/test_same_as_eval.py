"""A client that asks a suite's problems gets the answers that `sft eval` records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_toys import write_start
from serving_toys import NAME, running

from sft.cli.main import main
from sft.generate import Engine
from sft.run.named import load_named

SUITE = """\
source: {generate: {family: all, rows: 12, min_steps: 3, max_steps: 4, split: test, seed: 1}}
max_new_tokens: 24
batch_size: 5
"""


def test_a_client_counts_what_eval_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_start(tmp_path / "model")
    (tmp_path / "small.yaml").write_text(SUITE)
    words = ["--model", str(model), "--suite", str(tmp_path / "small.yaml"), "--output_dir", str(tmp_path / "out")]
    assert main(["eval", *words]) == 0
    [path] = (tmp_path / "out").rglob("samples.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(samples) == 12
    with running(Engine(*load_named(str(model)), batch_size=4)) as server:
        client = server.client()
        for sample in samples:
            made = client.completions.create(
                model=NAME,
                prompt=sample["prompt"],
                temperature=0,
                max_tokens=24,
                extra_body={"skip_special_tokens": False},
            )
            [choice] = made.choices
            assert choice.text == sample["completion"]
            assert (choice.finish_reason == "stop") == sample["finished"]
            assert made.usage.completion_tokens == sample["tokens"]
