"""The README's first walk: chat data of one's own and any causal language model, by `sft run` and overrides alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from chat_models import FAMILIES, Family, write_chats, write_model

from sft.cli.main import main
from sft.utils.files import read_json, read_sealed

ROWS = 12


def walk(root: Path, family: Family, *words: str) -> list[str]:
    """What is said after `sft VERB`."""
    if not (root / "data.jsonl").exists():
        write_chats(root / "data.jsonl", ROWS)
        write_model(root / "model", family)
    values = ["--variables.data", str(root / "data.jsonl"), "--variables.model", str(root / "model")]
    return ["lora-chat", *values, "--model.chat_template", family.template, "--output_dir", str(root / "run"), *words]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.kind)
def test_from_chats_to_an_export(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["run", *walk(tmp_path, family)]) == 0
    run = tmp_path / "run"
    stage = read_sealed(run / "stages/chat/manifest.json")
    assert stage is not None and stage["steps"] == 3
    assert (stage["data"]["documents"], stage["validation"]["documents"]) == (ROWS - 1, 1)
    assert stage["validation"]["loss_at_end"] < stage["validation"]["loss_at_start"]
    assert f"{stage['validation']['loss_at_end']:.4f}" in (run / "report/index.html").read_text()
    assert f"{stage['validation']['loss_at_end']:.4f}" in (run / "export/README.md").read_text()
    assert read_json(run / "stages/chat/final/adapter_config.json")["r"] == 16
    # The export loads with nothing of ours, and isn't the model that the run began with.
    exported = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    began = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert exported.config.model_type == family.kind
    changed = [name for name, value in exported.named_parameters() if not value.equal(began.get_parameter(name))]
    assert changed and AutoTokenizer.from_pretrained(run / "export").chat_template
    capsys.readouterr()
    assert main(["chat", *walk(tmp_path, family, "--prompt", "What is 3?", "--max_new_tokens", "4")]) == 0
    assert capsys.readouterr().out


def test_the_first_walk_of_the_readme_is_the_recipe(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command of it, with a small model in the place of the Hub's."""
    section = (repo_root / "README.md").read_text().split("## First walk")[1].split("\n## ")[0]
    commands = [line.split("#")[0].split() for line in re.findall(r"^sft .*$", section, re.MULTILINE)]
    assert [words[1] for words in commands][:3] == ["preview", "run", "chat"]
    monkeypatch.chdir(tmp_path)
    write_chats(Path("data.jsonl"), ROWS)
    write_model(Path("model"), FAMILIES[1])
    added = {"chat": ["--prompt", "Hello", "--max_new_tokens", "2"], "recipes": []}
    for _, verb, *words in commands:
        more = added.get(verb, ["--model.chat_template", FAMILIES[1].template])
        given = ["./model" if word == "$M" else word for word in words]
        assert main([verb, *given, *more]) == 0, (verb, capsys.readouterr().err)
    assert Path("my-lora.yaml").is_file()
