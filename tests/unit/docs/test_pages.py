"""What the documentation shows works as shown: links, recipes, commands, messages, and the site as a whole."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from doc_pages import Command, anchors, blocks, commands, doc_pages, links
from pydantic import BaseModel

from sft.cli.common import recipe_and_keys
from sft.cli.main import VERBS, parsed
from sft.recipe import load_recipe
from sft.recipe.data_checks import recipe_problems
from sft.recipe.describe import find_section, keys_of, sections
from sft.recipe.key_types import kinds_at
from sft.recipe.packaged import list_data_recipes, list_recipes, list_suites
from sft.recipe.problems import refuse
from sft.recipe.schema import DataSection, Recipe, Stage, SuiteSection
from sft.utils.errors import UsageError

ROOT = Path(__file__).resolve().parents[3]
PAGES = [path.relative_to(ROOT).as_posix() for path in doc_pages(ROOT)]
SECONDS = 300


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that excerpts name."""
    (tmp_path / "mine.yaml").write_text("suite: math500\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- links ----


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert not list(dead_links(ROOT / page))


def dead_links(page: Path) -> Iterator[str]:
    text = page.read_text(encoding="utf-8")
    for link in links(text):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = page.parent / target if target else page
        if not path.exists():
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors(path.read_text(encoding="utf-8")):
            yield f"{link}: no such heading"


def test_dead_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text("# One, two\n[x](#one-two) [y](b.md) [z](#two) `[no](link.md)`\n```\n[no](link.md)\n```\n")
    assert list(dead_links(page)) == ["b.md: no such file", "#two: no such heading"]


# ---- recipes ----


@pytest.mark.parametrize("page", PAGES)
def test_excerpts_of_recipes_load(page: str, folder: Path) -> None:
    for block in blocks((ROOT / page).read_text(encoding="utf-8")):
        place = f"{page}:{block.line}"
        if block.language == "yaml":
            excerpt = yaml.safe_load(block.text)
            assert excerpt is not None, place
            try:
                load(excerpt, block.text, folder)
            except UsageError as error:
                pytest.fail(f"{place}: {error}")
        elif not block.language:
            assert not looks_like_a_recipe(block.text), f"{place}: a recipe's lines; begin the block with ```yaml"


def load(excerpt: Any, text: str, folder: Path) -> Recipe:
    """The recipe that an excerpt stands in: what it doesn't say is filled in."""
    path = folder / "excerpt.yaml"
    path.write_text(text if {"name", "output_dir"} <= set(excerpt) else yaml.safe_dump(filled_in(excerpt)))
    recipe = load_recipe(path)
    refuse(recipe_problems(recipe), recipe.place)
    return recipe


def filled_in(excerpt: Any) -> dict[str, Any]:
    stage: dict[str, Any] = {"name": "s", "data": {"sources": [{"path": "rows.jsonl"}]}}
    whole: dict[str, Any] = {"name": "x", "output_dir": "x", "model": {"model_name_or_path": "m"}, "stages": [stage]}
    keys = {"steps"} if isinstance(excerpt, list) else set(excerpt)
    if keys <= set(Recipe.model_fields) - {"name"}:
        whole |= excerpt
    elif keys <= set(Stage.model_fields):
        stage |= excerpt
        if "sources" not in stage["data"] and "recipe" not in stage["data"]:
            stage["data"]["sources"] = [{"path": "rows.jsonl"}]
    elif keys <= {"variables", *DataSection.model_fields}:
        data = {"steps": excerpt} if isinstance(excerpt, list) else dict(excerpt)
        whole["variables"] = data.pop("variables", {})
        stage["data"] = {"sources": [{"path": "rows.jsonl"}], **data}
    elif keys <= set(SuiteSection.model_fields):
        stage["evaluate"] = {"suites": [{"name": "suite", **excerpt}]}
    else:
        raise UsageError(f"keys of no section: {', '.join(sorted(keys))}")
    return whole


def looks_like_a_recipe(text: str) -> bool:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return False
    known = {*Recipe.model_fields, *Stage.model_fields, *DataSection.model_fields, *SuiteSection.model_fields}
    return isinstance(found, dict) and set(found) <= known and text.lstrip()[:1] != "{"


# ---- commands ----


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page: str, folder: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    own = folder / "my.yaml"
    shown = [block.text for block in blocks(text) if re.match(r"(#.*\n)*name: ", block.text)]
    laptop = [block.text for block in blocks((ROOT / "docs/start/laptop.md").read_text()) if "stages:" in block.text]
    own.write_text((shown or laptop)[0])
    for command in commands(text):
        try:
            check_command(command.words, own)
        except (UsageError, SystemExit) as error:
            pytest.fail(f"{page}:{command.line}: sft {' '.join(command.words)}: {error}")


def check_command(words: list[str], own: Path) -> None:
    """Raise UsageError where `sft` wouldn't take these words. What is in capitals stands for anything."""
    if not words or words[0].isupper() or words[-1] in ("--help", "--version") or words in [[verb] for verb in VERBS]:
        return
    if "--" in words:
        check_command(words[words.index("--") + 1 :], own)
    words = ["1" if word == "N" else word for word in words]
    named_alone = len(words) == 2 and words[1][:2] == "--"  # an option that a sentence speaks of
    verb, arguments, rest = parsed([*words, *(["1"] if named_alone and takes_value(words) else [])])
    if words[0] == "recipes":
        check_named(arguments.action, arguments.name)
        if arguments.action == "copy" and arguments.file == own.name:
            own.write_text(next(one.path for one in list_recipes() if one.name == arguments.name).read_text())
    if not verb.TAKES_OVERRIDES or words[0] == "launch":
        return
    config, keys = recipe_and_keys(getattr(arguments, "config", None), rest)
    stray = [word for n, word in enumerate(keys) if word[:2] != "--" and (n == 0 or keys[n - 1][:2] != "--")]
    if stray:
        raise UsageError(f"stray words: {stray}")
    for key in (word[2:].partition("=")[0].split(".") for word in keys if word[:2] == "--"):
        if not kinds_at(tuple(["stages", "all", "evaluate", *key] if key[0] == "suites" else key)):
            raise UsageError(f"--{'.'.join(key)}: no such key")
    known = {recipe.name for recipe in list_recipes()}
    if words[0] != "sweep" and (config == own.name or config in known):
        load_recipe(own if config == own.name else str(config), [word for word in keys if "suites." not in word[:9]])
    elif config and not config.isupper() and not config.endswith((".yaml", "best.yaml")) and config not in known:
        raise UsageError(f"{config} is no packaged recipe")


def takes_value(words: list[str]) -> bool:
    try:
        parsed(words)
    except UsageError as error:
        return "expected one argument" in str(error)
    return False


def check_named(action: str, name: str | None) -> None:
    if action == "keys" and name and not name.isupper():
        find_section(name)
    if action in ("show", "copy") and name and not name.isupper():
        there = {entry.name for entry in (*list_recipes(), *list_data_recipes(), *list_suites())}
        if name not in there:
            raise UsageError(f"nothing packaged is called {name}")


@pytest.mark.parametrize(
    "line",
    [
        "sft runn my.yaml",
        "sft run my.yaml --stages.larger.train.learning_rat 1",
        "sft run my.yaml --stages.smaller.train.learning_rate 1",
        "sft chat my.yaml --prompt 2 and 2",
        "sft serve --model x --no_such_option",
        "OMP_NUM_THREADS=1 sft recipes copy no-such-recipe",
        "sft launch --slurm -- run my.yaml --no.such.key 1",
    ],
)
def test_wrong_commands_are_found(line: str, folder: Path) -> None:
    (command,) = commands(f"```\n{line}\n```\n")
    (folder / "my.yaml").write_text(
        "name: x\noutput_dir: x\nmodel: {model_name_or_path: m}\n"
        "stages: [{name: larger, data: {sources: [{path: rows.jsonl}]}}]\n"
    )
    with pytest.raises(UsageError):
        check_command(command.words, folder / "my.yaml")


def test_commands_are_found() -> None:
    block = "M=a/b\ncd x && A=1 sft run \\\n  $M | tee y   # sft no\ntorchrun -m sft eval z\n"
    text = f"Say `sft plan x.yaml`.\n```\n{block}```\n"
    assert commands(text) == [Command(4, ["run", "a/b"]), Command(6, ["eval", "z"]), Command(1, ["plan", "x.yaml"])]


# ---- the reference ----


def test_the_reference_is_what_the_schema_says() -> None:
    tool = module(ROOT / "tools/recipe_reference.py")
    old = [name for name, text in tool.pages().items() if (tool.FOLDER / name).read_text(encoding="utf-8") != text]
    assert not old, "python tools/recipe_reference.py writes them"
    shown = set(tool.shown_sections().values())
    assert set(sections().values()) <= shown, "sections that no page shows"


def test_every_key_has_a_meaning() -> None:
    def mute(section: type[BaseModel]) -> list[str]:
        return [key.name for key in keys_of(section) if len(key.meaning) < 8]

    assert not {path: found for path, section in sections().items() if (found := mute(section))}


# ---- messages ----


def test_messages_that_are_explained_are_in_the_code() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    explained = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    assert len(explained) > 40
    said = texts_of_the_code()
    assert [message for message in explained if not is_said(message, said)] == []
    assert not is_said("the moon is … today", said)


def is_said(message: str, said: list[str]) -> bool:
    """Whether some text of the code has all fixed parts of a message, in order."""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("…")), re.DOTALL)
    return any(pattern.search(text) for text in said)


def texts_of_the_code() -> list[str]:
    """Every text that the code may say; what is put in while it runs is `…`."""
    found = []
    for path in sorted((ROOT / "sft").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


# ---- the how-to that is code ----


def test_the_step_of_the_how_to_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from step_toys import context, record

    from sft.data.read.outcomes import Dropped

    code = [
        block.text for block in blocks((ROOT / "docs/howto/add-a-step.md").read_text()) if block.language == "python"
    ]
    settings = types.ModuleType("sft.recipe.steps.ban")
    monkeypatch.setitem(sys.modules, settings.__name__, settings)
    exec(compile(code[0], "ban", "exec"), settings.__dict__)
    step: dict[str, Any] = {}
    exec(compile(code[2], "ban", "exec"), step)
    rows = [record("?", answer) for answer in ("Sorry, no.", "Yes.")]
    outcomes = list(step["Ban"](settings.BanStep(words=["sorry"]), context(tmp_path))(rows))
    assert [isinstance(outcome, Dropped) for outcome in outcomes] == [True, False]


# ---- the site ----


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]* src="?(?:https?:)?//[^>]*', text), page
        assert not re.findall(r'<link[^>]* rel="?(?:stylesheet|preconnect)[^>]* href="?(?:https?:)?//[^>]*', text), page
        assert "```" not in text, f"{page}: a block that isn't one on the site"


def module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = found
    spec.loader.exec_module(found)
    return found
