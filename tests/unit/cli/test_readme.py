"""What the README shows works as shown. (Its links, commands and other excerpts: tests/unit/docs.)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_pages import blocks

from sft.cli.main import VERBS
from sft.recipe import load_recipe
from sft.recipe.packaged import list_recipes
from sft.utils.errors import UsageError


@pytest.fixture(scope="module")
def readme(repo_root: Path) -> str:
    return (repo_root / "README.md").read_text()


def test_the_recipe_loads(readme: str, tmp_path: Path) -> None:
    (block,) = [block.text for block in blocks(readme) if block.text.startswith("name: ")]
    path = tmp_path / "my.yaml"
    path.write_text(block)
    recipe = load_recipe(path, ["--stages.distill.train.learning_rate", "2e-5", "--variables.data", "other.jsonl"])
    assert recipe.stages[0].data.sources[0].path == "other.jsonl"
    assert [stage.train.learning_rate for stage in recipe.stages] == [2e-5, 1e-5]
    path.write_text(block.replace("max_length: 16384, ", "learning_rat: 1, "))
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    # The very line that the README shows as an example.
    shown = re.search(r"`(my\.yaml:\d+: [^`]*)`", readme)
    assert shown and str(caught.value) == f"{tmp_path}/{shown[1]}"


@pytest.mark.parametrize("page", ["README.md", "docs/commands.md"])
def test_every_verb_is_in_the_table(page: str, repo_root: Path) -> None:
    table = (repo_root / page).read_text().split("| verb |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(VERBS)


def test_every_packaged_recipe_is_named(readme: str) -> None:
    for recipe in list_recipes():
        assert f"`{recipe.name.split('/')[0]}`" in readme, recipe.name


def test_make_targets_that_are_named_exist(readme: str, repo_root: Path) -> None:
    text = readme + (repo_root / "CONTRIBUTING.md").read_text()
    makefile = (repo_root / "Makefile").read_text()
    named = set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE))
    assert {"demo", "test", "setup"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
