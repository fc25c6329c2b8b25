"""`chat`, `eval` and `export` with --model on what a LoRA stage left: the base is found, and the adapter is on it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from chat_models import FAMILIES, write_chats, write_model
from run_toys import small_recipe
from train_toys import saved_weights

from sft.cli.main import main
from sft.recipe import RunPaths
from sft.run.chain import run
from sft.run.evaluation import evaluate_other
from sft.utils.files import read_json

QWEN = FAMILIES[1]
ASK = ["--prompt", "What is 3?", "--max_new_tokens", "12"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data.jsonl`, `model` and `run`, whose adapter answers something else than the model did."""
    root = tmp_path_factory.mktemp("trained")
    write_model(root / "model", QWEN)
    write_chats(root / "data.jsonl", 12)
    rate = ["--stages.chat.train.learning_rate", "0.05", "--stages.chat.train.num_train_epochs", "8"]
    assert main(["train", *words(root), *rate]) == 0
    return root


def words(root: Path) -> list[str]:
    values = ["--variables.data", str(root / "data.jsonl"), "--variables.model", str(root / "model")]
    return ["lora-chat", *values, "--model.chat_template", QWEN.template, "--output_dir", str(root / "run")]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize("inside", ["stages/chat", "stages/chat/final"])
def test_chat_takes_the_adapter(inside: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_recipe = said(capsys, "chat", *words(trained), *ASK)
    assert said(capsys, "chat", "--model", str(trained / "run" / inside), *ASK) == by_recipe
    before = said(capsys, "chat", "--model", str(with_template(trained)), *ASK)
    assert before != by_recipe


def with_template(trained: Path) -> Path:
    """The model that the run began with, with the run's tokenizer, so that it can be asked."""
    folder = trained / "asked"
    shutil.copytree(trained / "model", folder, dirs_exist_ok=True)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        shutil.copy(trained / "run/stages/chat/final" / name, folder)
    return folder


def test_export_merges_it(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "export", "--model", str(trained / "run/stages/chat"), "--out", str(tmp_path / "own")).strip()
    said(capsys, "export", *words(trained), "--out", str(tmp_path / "theirs"))
    own, theirs = saved_weights(Path(out)), saved_weights(tmp_path / "theirs")
    assert own.keys() == theirs.keys() and all(own[name].equal(weight) for name, weight in theirs.items())
    assert (tmp_path / "own/README.md").read_text() == (tmp_path / "theirs/README.md").read_text()


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ([], "--model PATH needs --out DIR"),
        (["--out", "x", "--push.merge_lora", "false"], "--push.merge_lora goes with a recipe"),
        (["--out", "x", "--config", "tiny"], "--config, --stage or --dry_run goes with a recipe"),
    ],
)
def test_export_of_a_folder_takes_no_recipe(more: list[str], line: str, trained: Path, capsys: Any) -> None:
    assert main(["export", "--model", str(trained / "run/stages/chat"), *more]) == 2
    assert line in capsys.readouterr().err


def test_eval_takes_the_adapter(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, stages=({"use_peft": True, "learning_rate": 0.05},))
    paths, result = RunPaths(recipe), run(recipe)["evaluations"]
    for name in (paths.stage_dir("a"), paths.final_dir("a")):
        (metrics,) = evaluate_other(paths, str(name), None).values()
        assert metrics["sums"]["pass_at_1"] == result["a"]["sums"]["pass_at_1"]
        assert metrics["sums"]["tokens"] == result["a"]["sums"]["tokens"]


@pytest.mark.parametrize("verb", ["chat", "export"])
def test_a_base_that_is_gone_is_one_sentence(
    verb: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "moved")
    root = tmp_path / "moved"
    for name in ("resolved.yaml", "recipe.yaml"):
        text = (root / "run" / name).read_text().replace(str(trained / "model"), str(root / "gone"))
        (root / "run" / name).write_text(text)
    manifest = root / "run/manifest.json"
    manifest.unlink(missing_ok=True)
    more = ASK if verb == "chat" else ["--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert main([verb, "--model", str(root / "run/stages/chat"), *more]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    final = root / "run/stages/chat/final"
    assert last.startswith(f"sft: {final} is an adapter, and its base model can't be had: ") and "gone" in last


def test_an_adapter_away_from_its_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained / "run/stages/chat/final", tmp_path / "alone")
    assert main(["chat", "--model", str(tmp_path / "alone"), *ASK]) == 1
    told = capsys.readouterr().err
    assert "it lies outside of the run that made it" in told and len(told.strip().splitlines()) == 1
    # By the name that peft knows its base by, it is found, where no run says what the base was.
    (tmp_path / "alone/base.json").unlink()
    assert read_json(tmp_path / "alone/adapter_config.json")["base_model_name_or_path"] == str(trained / "model")
    assert said(capsys, "chat", "--model", str(tmp_path / "alone"), *ASK) == said(
        capsys, "chat", "--model", str(trained / "run/stages/chat"), *ASK
    )
