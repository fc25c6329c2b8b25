"""`model.chat_template`: a known family, a file or the template itself; what the recipe says is what is handed on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft.recipe.chat_templates import families, family
from sft.recipe.load import load_recipe, resolved_yaml
from sft.recipe.schema import ModelSection
from sft.tokenizers.load import load_tokenizer, start_tokenizer
from sft.tokenizers.templates import CHATML_TEMPLATE, PUBLISHED_TEMPLATE, known_template, trained_twin
from sft.tokenizers.turns import end_of_turn, spelled_end
from sft.utils.errors import UsageError

RECIPE = """name: r
output_dir: out
model:
  config: {}
  tokenizer: tiny
  chat_template: %s
stages: [{name: one, data: {sources: [{generate: {rows: 4}}]}}]
"""


def recipe_of(folder: Path, value: str) -> Any:
    path = folder / "r.yaml"
    path.write_text(RECIPE % value)
    return load_recipe(path)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("chatml", "chatml"),
        ("Qwen2.5", "qwen2_5"),
        ("llama3.1", "llama3_1"),
        ("phi4_mini", "phi4-mini"),
        ("qwen3", "qwen3"),
    ],
)
def test_families_by_name(tmp_path: Path, said: str, meant: str) -> None:
    assert recipe_of(tmp_path, said).model.chat_template == meant == family(said)
    assert known_template(meant).count("{%") > 1


def test_every_family_has_a_template() -> None:
    assert {"chatml", "llama3", "qwen3", "phi4-mini", "gemma3"} <= set(families())
    assert known_template("chatml") == CHATML_TEMPLATE and known_template("phi4-mini") == PUBLISHED_TEMPLATE
    twins = [trained_twin(known_template(name)) for name in families()]
    assert sum(twin is not None and "generation" in twin for twin in twins) > 20


def test_a_file_is_its_text_from_then_on(tmp_path: Path) -> None:
    """Also in the recipe that is recorded: what becomes of the file doesn't matter."""
    template = tmp_path / "mine.jinja"
    template.write_text(CHATML_TEMPLATE + "\n{# ${not_a_variable} #}")
    recipe = recipe_of(tmp_path, str(template))
    assert recipe.model.chat_template == template.read_text()
    template.unlink()
    again = tmp_path / "again.yaml"
    again.write_text(resolved_yaml(recipe))
    assert load_recipe(again) == recipe


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("qwen33", "did you mean qwen3"),
        ("./none.jinja", "is no template, no file and no known family; known are chatml"),
        ("r.yaml", "is a file that holds no chat template"),
        ('""', "no known family"),
    ],
)
def test_anything_else_is_refused_with_its_line(
    tmp_path: Path, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"r\.yaml:6: model\.chat_template") as caught:
        recipe_of(tmp_path, value)
    assert said in str(caught.value)


def test_the_template_is_handed_on_with_the_tokenizer(tmp_path: Path) -> None:
    section = ModelSection(config={}, tokenizer="tiny", chat_template="llama3")
    tokenizer = start_tokenizer(section)
    assert tokenizer.chat_template == known_template("llama3")
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).chat_template == known_template("llama3")
    assert load_tokenizer("tiny").chat_template == PUBLISHED_TEMPLATE


def test_an_answer_ends_with_a_token(tmp_path: Path) -> None:
    """`<|im_end|>` where the tokenizer has it, else the end of text; other templates' ends are told."""
    tokenizer = start_tokenizer(ModelSection(config={}, tokenizer="tiny", chat_template="chatml"))
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id and spelled_end(tokenizer, tokenizer.chat_template) is None
    said = tokenizer.apply_chat_template([{"role": "assistant", "content": "4"}], tokenize=False)
    assert said == f"<|im_start|>assistant\n4{tokenizer.eos_token}\n"
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = start_tokenizer(ModelSection(config={}, tokenizer=str(tmp_path), chat_template="chatml"))
    assert tokenizer.chat_template == CHATML_TEMPLATE
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    llama = start_tokenizer(ModelSection(config={}, tokenizer="tiny", chat_template="llama3"))
    assert spelled_end(llama, llama.chat_template) == "<|eot_id|>"
    assert spelled_end(load_tokenizer("tiny"), PUBLISHED_TEMPLATE) is None
