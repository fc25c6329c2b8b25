"""`sft recipes` and `sft doctor`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from child_time import run_timed

from sft.cli.main import main
from sft.recipe import load_recipe
from sft.recipe.packaged import list_data_recipes, list_recipes


def test_recipes_are_listed_with_their_titles(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    for packaged in [*list_recipes(), *list_data_recipes()]:
        assert packaged.name in out and packaged.title.split()[0] in out


def test_a_recipe_is_shown_and_copied(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "gsm8k"]) == 0
    text = capsys.readouterr().out
    assert main(["recipes", "copy", "gsm8k", "my.yaml"]) == 0
    assert "sft run --config my.yaml" in capsys.readouterr().out
    assert Path("my.yaml").read_text() == text
    assert load_recipe("my.yaml") == load_recipe("gsm8k")
    assert main(["recipes", "copy", "phi4-mini-flash/lora"]) == 0
    assert load_recipe("phi4-mini-flash-lora.yaml").stages[0].train.use_peft


def test_a_copy_overwrites_only_with_force(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.yaml").write_text("mine")
    assert main(["recipes", "copy", "gsm8k", "my.yaml"]) == 1
    assert capsys.readouterr().err == "sft: my.yaml exists; give another name, or --force to overwrite it\n"
    assert Path("my.yaml").read_text() == "mine"
    assert main(["recipes", "copy", "gsm8k", "my.yaml", "--force"]) == 0
    assert load_recipe("my.yaml").name == "gsm8k"


def test_a_copy_into_a_folder_keeps_its_name(in_tmp: Path) -> None:
    Path("there").mkdir()
    assert main(["recipes", "copy", "gsm8k", "there"]) == 0
    assert load_recipe("there/gsm8k.yaml").name == "gsm8k"


def test_a_copy_where_nothing_can_be_written(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    assert main(["recipes", "copy", "gsm8k", "file/my.yaml"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("sft: ") and err.count("\n") == 1


def doctor(**environment: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """`sft doctor --json` in a process of its own, and its processor time."""
    variables = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "SAMBAY_KERNELS")}
    return run_timed([sys.executable, "-m", "sft", "doctor", "--json"], env={**variables, **environment})


def test_doctor_tells_what_is_here_quickly_and_keeps_the_token(tmp_path: Path) -> None:
    done, seconds = doctor(HF_TOKEN="hf_verysecret", HF_HOME=str(tmp_path))
    assert seconds < 60
    assert done.returncode == 0, done.stderr
    assert "verysecret" not in done.stdout + done.stderr
    findings = {finding["what"]: finding for finding in json.loads(done.stdout)["findings"]}
    for name in ("python", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "deepspeed"):
        assert findings[name]["state"] == "ok", findings[name]
    ops = ("add_layer_norm", "selective_scan", "causal_conv1d", "swiglu", "differential_attention")
    for op in (*ops, "linear_cross_entropy"):
        assert " on cpu: " in findings[op]["text"] or " on cuda: " in findings[op]["text"], findings[op]
    assert findings["Hugging Face Hub"]["text"].startswith("a token is set (HF_TOKEN)")
    assert "flash-attn" in findings and "disk" in findings
    assert findings["trackers"]["text"].startswith("trackio ")


def test_doctor_names_what_is_wrong(tmp_path: Path) -> None:
    done, _ = doctor(SAMBAY_KERNELS="quick", HF_HOME=str(tmp_path))
    told = json.loads(done.stdout)
    findings = told["findings"]
    assert done.returncode == 1 and told["ok"] is False
    assert any(finding["state"] == "problem" and "SAMBAY_KERNELS" in finding["text"] for finding in findings)
    assert any("not logged in" in finding["text"] for finding in findings)
