"""The model card: what it tells of a run, and what it says where the run tells nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft.hub.card import CODE_LICENCE, licence_text, model_card
from sft.hub.provenance import run_record, write_recipe
from sft.utils.files import read_sealed, write_sealed

FACTS = {
    "model_type": "phi4flash",
    "architecture": "Phi4FlashForCausalLM",
    "dtype": "bfloat16",
    "parameters": 3_852_562_944,
    "layers": 32,
    "hidden_size": 2560,
    "vocab_size": 200_064,
    "has_tokenizer": True,
    "has_template": True,
    "adapter_base": None,
    "transformers": "5.23.0",
    "merge": None,
    "reload": {"error": 2e-3},
}

RECIPE = """\
name: my-run
description: Reasons about sums.
output_dir: runs/x
seed: 7
model: {model_name_or_path: microsoft/Phi-4-mini-flash-reasoning, dtype: bfloat16}
stages:
  - name: broad
    data:
      sources:
        - {path: openai/gsm8k, license: mit}
        - {path: HOME/secret/mine.jsonl}
    train: {learning_rate: 1.0e-05, num_train_epochs: 2, max_length: 2048, packing: true}
  - name: hard
    data: {sources: [{generate: {family: words, rows: 5}}]}
    train: {learning_rate: 5.0e-06, max_length: 4096}
push: {repo_id: me/x}
# a token that has no business here: hf_abcdefghijklmnopqrstuv
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one stage done, one not, and an evaluation before and after the first."""
    root = tmp_path / "run"
    root.mkdir()
    (root / "resolved.yaml").write_text(RECIPE.replace("HOME", str(Path.home())))
    funnel = {"rows": 1000, "kept": 970, "dropped": {"over_length": 20, "bad": 10}, "bad": {"not json": 10}}
    data = {
        "rows": 1000,
        "documents": 970,
        "packs": 80,
        "tokens": 160_000,
        "supervised_tokens": 120_000,
        "max_document_length": 2040,
        "funnel": {**funnel, "truncated": 0},
    }
    environment = {"packages": {"torch": "2.13.0"}, "python": "3.11.9", "git": {"commit": "abcdef0123456789"}}
    manifest = {"steps": 160, "epochs": 2.0, "final_loss": 0.51234, "data": data, "environment": environment}
    write_sealed(root / "stages" / "broad" / "manifest.json", manifest)
    for point, value in (("start", 0.031), ("broad", 0.942)):
        metrics = {
            "suite": "gsm8k",
            "pass_at_1": value,
            "interval": [value - 0.01, value + 0.01],
            "problems": 1319,
            "samples": 1319,
            "settings": {"temperature": 0.0, "max_new_tokens": 512},
        }
        write_sealed(root / "eval" / point / "gsm8k" / "metrics.json", metrics)
    return root


def metadata(card: str) -> dict[str, Any]:
    """The YAML block, read as the Hub reads it."""
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def row(card: str, *cells: str) -> bool:
    """Whether a table row holds these cells, in this order."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("|")]
    return any(all(cell in line for cell in cells) for line in rows)


def test_the_card_tells_of_the_run(run: Path) -> None:
    card = model_card(run_record(run), FACTS)
    assert metadata(card) == {
        "license": "mit",
        "base_model": "microsoft/Phi-4-mini-flash-reasoning",
        "base_model_relation": "finetune",
        "datasets": ["openai/gsm8k"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["text-generation", "sft", "reasoning", "sambay-sft", "sambay", "phi4flash", "custom_code"],
    }
    assert "# my-run" in card and "Reasons about sums." in card and "in 2 stages (no reinforcement learning)" in card
    assert "3,852,562,944 parameters" in card and "2.0e-03" in card
    assert row(card, "broad", "openai/gsm8k, mine.jsonl", "970", "160,000", "120,000", "2,048 packed", "1e-05", "160")
    assert row(card, "hard (not trained)", "generated: words", "-", "4,096", "5e-06")
    assert row(card, "broad", "1,000", "970", "over_length: 20, bad: 10 (bad: not json 10)", "0")
    assert "openai/gsm8k: mit" in card and "mine.jsonl: not stated" in card
    assert row(card, "before training", "gsm8k", "3.1", "2.1 to 4.1", "1,319")
    assert row(card, "after broad", "gsm8k", "94.2", "93.2 to 95.2", "greedy, up to 512 tokens")
    assert "torch 2.13.0" in card and "at commit abcdef012345" in card and "2,040 tokens" in card
    assert "trust_remote_code=True" in card and "apply_chat_template" in card


def test_the_card_tells_what_a_stage_hands_on(run: Path) -> None:
    path = run / "stages" / "broad" / "manifest.json"
    manifest = read_sealed(path) or {}
    write_sealed(path, {**manifest, "average": [{"name": "ema", "weight": 1.0, "files": {}}]})
    said = "Stage broad hands on the moving average of its weights, not the weights of its last step."
    assert said in model_card(run_record(run), FACTS)
    write_sealed(path, {**manifest, "average": [{"name": "checkpoint-160", "weight": 1.0, "files": {}}]})
    assert "hands on" not in model_card(run_record(run), FACTS)


def test_home_and_tokens_are_not_published(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    write_recipe(run, folder)
    text = (folder / "recipe.yaml").read_text() + json.dumps(run_record(run))
    assert "hf_abcdef" not in text and "<token>" in text
    assert f"{Path.home()}/secret" not in text and "~/secret/mine.jsonl" in text


def test_a_model_without_a_run(run: Path) -> None:
    assert "26 Jul 2024" in model_card(None, {**FACTS, "writes_date": True}) and "2024" not in model_card(None, FACTS)
    card = model_card(None, {**FACTS, "reload": None, "has_template": False})
    assert "license" not in metadata(card) and "base_model" not in metadata(card)
    assert card.count("Not recorded.") == 3 and "Not evaluated." in card
    assert "Nothing about its quality was measured" in card and "No licence of the weights is stated" in card


def test_the_card_tells_how_vllm_serves_it() -> None:
    lines = "pip install vllm sambay-vllm\nvllm serve ..."
    assert lines in model_card(None, FACTS)
    for other in ({"model_type": "llama"}, {"adapter_base": "some/base"}):
        assert "vllm" not in model_card(None, {**FACTS, **other})


@pytest.mark.parametrize("broken", ["resolved.yaml", "stages/broad/manifest.json", "eval/broad/gsm8k/metrics.json"])
@pytest.mark.parametrize("content", [None, "{", "[]", "{}", "null"])
def test_missing_and_broken_parts_of_a_run_are_no_error(run: Path, broken: str, content: str | None) -> None:
    (run / broken).unlink()
    if content is not None:
        (run / broken).write_text(content)
    card = model_card(run_record(run), FACTS)
    assert metadata(card)["library_name"] == "transformers"
    assert ("after broad" in card) == (broken == "stages/broad/manifest.json")


def test_no_card_invents_an_evaluation(run: Path) -> None:
    for path in (run / "eval").rglob("metrics.json"):
        path.unlink()
    card = model_card(run_record(run), FACTS)
    assert "Not evaluated." in card and "pass@1" not in card


def test_the_code_licence_is_the_projects(repo_root: Path, run: Path) -> None:
    assert (repo_root / "LICENSE").read_text() == CODE_LICENCE
    text = licence_text(run_record(run), FACTS)
    assert CODE_LICENCE in text and "derive from microsoft/Phi-4-mini-flash-reasoning" in text
    plain = licence_text(None, {**FACTS, "model_type": "qwen3"})
    assert CODE_LICENCE not in plain and "their owner decides" in plain


def test_the_page_of_a_tracked_run_stands_beside_the_model(run):
    """By the tags that the Hub reads, and for people; of stages that are done."""
    assert "trackio" not in model_card(run_record(run), FACTS)
    text = (run / "resolved.yaml").read_text()
    for rate, space in (("1.0e-05", "me/first"), ("5.0e-06", "me/other")):
        text = text.replace(f"learning_rate: {rate},", f"learning_rate: {rate}, trackio_space_id: {space},")
    (run / "resolved.yaml").write_text(text)
    card = model_card(run_record(run), FACTS)
    url = "https://huggingface.co/spaces/me/first"
    assert metadata(card)["tags"][-2:] == ["trackio", f"trackio:{url}"]
    assert f"Training metrics: [me/first]({url})." in card and "me/other" not in card
