"""Writes docs/reference/*.md from the schema: every key of a recipe, its types, its default, whose name it has.

python tools/recipe_reference.py          # write them anew
python tools/recipe_reference.py --check  # exit 1 where one isn't what the schema says
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from sft.recipe.describe import Key, keys_of, sections, sections_within
from sft.recipe.refused_keys import FIXED, REFUSED
from sft.recipe.schema import Defaults, ModelSection, Stage, SuiteSection
from sft.recipe.steps.generate import GenerateStep
from sft.recipe.train_keys import LORA_KEYS, OWN_KEYS, TrainSection

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
OURS = "ours"
GENERATED = "<!-- Written by tools/recipe_reference.py from sft/recipe: change the schema, not this page. -->"


class Page(NamedTuple):
    """A page: its file, its heading, what stands above the keys, and the sections that it shows, by their places."""

    file: str
    title: str
    above: str
    shows: tuple[str, ...]


STEPS = "stages.data.steps"
PAGES = (
    Page(
        "recipe.md",
        "A recipe's keys",
        "One YAML file is one run. Its sections have pages of their own: [data](data.md), [steps](steps.md), "
        "[train](train.md), [evaluate](evaluate.md). `sft recipes keys SECTION` prints the same tables, and "
        "`sft recipes schema` the JSON Schema for editors. An empty default means that the key isn't set.",
        ("", "model", "defaults", "stages", "stages.average", "stages.stop_when", "push", "report"),
    ),
    Page(
        "data.md",
        "Keys of data",
        "What a stage learns from. [Own data](../howto/own-data.md) is the how-to.",
        ("stages.data", "stages.data.sources", "stages.data.sources.generate", "stages.data.validation"),
    ),
    Page(
        "steps.md",
        "Keys of steps",
        "An entry of `steps` is one step and its settings, or its name where the defaults will do. They stand in "
        "`data.steps` (for all rows), or in a source's `steps` (for its rows alone). "
        "[Adding a step](../howto/add-a-step.md) says how another one is written.",
        (STEPS, f"{STEPS}.*"),
    ),
    Page(
        "train.md",
        "Keys of train",
        "Keys have the names of transformers' `TrainingArguments` and TRL's `SFTConfig`, LoRA's those of TRL's "
        "`ModelConfig`, and mean the same; `ours` are those that no library has a name for.",
        ("stages.train", "stages.train.*"),
    ),
    Page(
        "evaluate.md",
        "Keys of evaluate",
        "The suites that a stage is asked. [Evaluation](../evaluation.md) says how. A suite's file has the same keys.",
        (
            "stages.evaluate",
            "stages.evaluate.suites",
            "stages.evaluate.suites.source",
            "stages.evaluate.suites.choices",
            "stages.evaluate.every",
        ),
    ),
)


def main() -> int:
    """Write the pages, or say which aren't what they should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is old")
    check = parser.parse_args().check
    texts = pages()
    old = [name for name, text in texts.items() if not _is(FOLDER / name, text)]
    for name in old:
        if not check:
            FOLDER.mkdir(parents=True, exist_ok=True)
            (FOLDER / name).write_text(texts[name], encoding="utf-8")
        print(f"docs/reference/{name}{' is old: python tools/recipe_reference.py writes it' if check else ''}")
    return 1 if check and old else 0


def pages() -> dict[str, str]:
    """Every page's text by its file's name."""
    return {page.file: "".join(_page(page)) for page in PAGES}


def shown_sections() -> dict[str, type[BaseModel]]:
    """The sections that stand on some page, by their keys from the top."""
    return {path: section for page in PAGES for path, section in _shown(page)}


def origin(section: type[BaseModel], key: str) -> str:
    """Whose name a key has."""
    if section is TrainSection and key not in OWN_KEYS:
        if key in LORA_KEYS:
            return "TRL ModelConfig, for peft" if key in _names("trl", "ModelConfig") else "peft LoraConfig"
        return "transformers" if key in _names("transformers", "TrainingArguments") else "TRL SFTConfig"
    if section is ModelSection and key in ("trust_remote_code", *_names("trl", "ModelConfig")):
        return "TRL ModelConfig"
    if section in (SuiteSection, GenerateStep) and key in ("temperature", "top_p", "max_new_tokens", "max_length"):
        return "generation"
    return OURS


@cache
def _names(library: str, name: str) -> frozenset[str]:
    """The keys of a library's configuration."""
    return frozenset(field.name for field in fields(getattr(__import__(library), name)))


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def _shown(page: Page) -> Iterator[tuple[str, type[BaseModel]]]:
    known = sections()
    for wanted in page.shows:
        if wanted.endswith(".*"):
            yield from ((path, section) for path, section in known.items() if path.startswith(wanted[:-1]))
        else:
            yield wanted, known[wanted]


def _page(page: Page) -> Iterator[str]:
    yield f"{GENERATED}\n\n# {page.title}\n\n{page.above}\n"
    places = {section: path for path, section in _shown(page)}
    for path, section in _shown(page):
        name = path.rpartition(".")[2]
        if path and path != page.shows[0]:
            yield f"\n## `{name}`\n"
        yield f"\n{_escaped(' '.join((section.__doc__ or '').split()))}\n"
        if path:
            yield f"\nWritten at `{path}`.\n"
        yield from _table(section, places)
    if page.file == "train.md":
        yield from _refused()


def _table(section: type[BaseModel], places: dict[type[BaseModel], str]) -> Iterator[str]:
    yield "\n| key | meaning | what it may be | default | name from |\n|---|---|---|---|---|\n"
    for key in keys_of(section):
        kind = _linked(section, key, places)
        default = _code(key.default) if key.default not in ("", "required") else key.default
        meaning, whose = _escaped(key.meaning), origin(section, key.name)
        yield f"| `{key.name}` | {meaning} | {kind} | {default} | {whose} |\n"


def _linked(section: type[BaseModel], key: Key, places: dict[type[BaseModel], str]) -> str:
    """What a key may be; the word `section` leads to it."""
    text = _escaped(key.kind)
    holder = Stage if section is Defaults else section
    for inside in sections_within(holder.model_fields[key.name]):
        found = next((other for other in PAGES for _, one in _shown(other) if one is inside), None)
        if found is not None:
            path = places.get(inside) or next(path for path, one in _shown(found) if one is inside)
            file = "" if inside in places else found.file
            anchor = "" if path == found.shows[0] else f"#{path.rpartition('.')[2]}"
            return re.sub(r"section|anything", f"[section]({file}{anchor})", text) if file or anchor else text
    return text


def _refused() -> Iterator[str]:
    yield "\n## Keys that are refused\n\n"
    yield "Keys of TRL, transformers, axolotl and LLaMA-Factory that would do nothing here, or something else. Each "
    yield "is an error with this reason.\n\n| key | why |\n|---|---|\n"
    by_reason: dict[str, list[str]] = {}
    for key, reason in REFUSED.items():
        by_reason.setdefault(reason, []).append(key)
    for reason, keys in by_reason.items():
        yield f"| {', '.join(f'`{key}`' for key in keys)} | {_escaped(reason)} |\n"
    yield "\nThese may be written with one value alone, since it says what is done anyway:\n\n"
    yield "| key | value | why no other |\n|---|---|---|\n"
    for key, (value, reason) in FIXED.items():
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        yield f"| `{key}` | {_code(shown)} | {_escaped(reason)} |\n"


def _code(text: str) -> str:
    return (
        f"<code>{text.replace('&', '&amp;').replace('<', '&lt;').replace('|', '&#124;')}</code>"
        if "|" in text
        else f"`{text}`"
    )


def _escaped(text: str) -> str:
    """Text for a table's cell: what stands in backticks as code, the rest without meaning to Markdown."""
    out = []
    for index, piece in enumerate(re.split(r"`([^`]*)`", text)):
        if index % 2:
            out.append(_code(piece))
        else:
            piece = piece.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
            out.append(re.sub(r"([*\\]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", piece))
    return "".join(out)


if __name__ == "__main__":
    sys.exit(main())
