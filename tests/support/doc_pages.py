"""The pages of the documentation, taken apart: fences, links, anchors, and the `sft` commands that they show."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

FENCE = re.compile(r"^([ >]*)```([\w-]*)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\[\]]*\]\(([^()\s]+)\)")
SHELL = ("", "bash", "sh", "shell")
ENDS = ("&&", "||", "|", ";", "&", ">", ">>", "<")


class Block(NamedTuple):
    """A fenced block: its language, the page's line that it begins on, and its text."""

    language: str
    line: int
    text: str


class Command(NamedTuple):
    """A command line that is shown: the page's line, and the words behind `sft`."""

    line: int
    words: list[str]


def doc_pages(root: Path) -> list[Path]:
    """Every page that users read, by its place."""
    beside = [*root.glob("configs/*/README.md"), root / "data_recipes/README.md"]
    top = [root / name for name in ("README.md", "AGENTS.md", "CONTRIBUTING.md")]
    return [*top, *sorted(root.glob("docs/**/*.md")), *sorted(beside)]


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page."""
    return [Block(match[2], text.count("\n", 0, match.start()) + 1, dedent(match[3])) for match in FENCE.finditer(text)]


def links(text: str) -> list[str]:
    """Where a page's links and pictures lead."""
    return LINK.findall(re.sub(r"`[^`\n]*`", "", FENCE.sub("", text)))


def anchors(text: str) -> set[str]:
    """What may stand behind a page's `#`: where code hosts and mkdocs agree."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {_of_host(heading) for heading in headings} & {_of_mkdocs(heading) for heading in headings}


def _of_host(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _of_mkdocs(heading: str) -> str:
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def commands(text: str) -> list[Command]:
    """The `sft` commands of a page: of its shell blocks, and those that stand in a sentence."""
    found = [
        Command(block.line + number, words)
        for block in blocks(text)
        if block.language in SHELL
        for number, words in _of_shell(block.text)
    ]
    for match in re.finditer(r"`(sft [^`]+)`", re.sub(FENCE, lambda fence: "\n" * fence[0].count("\n"), text)):
        number = text.count("\n", 0, text.find(match[0])) + 1
        found += [Command(number, words) for words in _behind_sft(_words(match[1]))]
    return found


def _of_shell(text: str) -> Iterator[tuple[int, list[str]]]:
    """(line, words behind `sft`) of a block; variables that it sets are put in."""
    known: dict[str, str] = {}
    until, whole, first = "", "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if until:
            until = "" if line.strip() == until else until
            continue
        here = re.search(r"<<-?'?(\w+)'?", line)
        until = here[1] if here else ""
        whole, first = (f"{whole} {line}", first) if whole else (line, number)
        if whole.endswith("\\"):
            whole = whole[:-1]
            continue
        if given := re.fullmatch(r"([A-Z]\w*)=(\S+|'[^']*')", whole.strip()):
            known[given[1]] = given[2].strip("'")
        for words in _behind_sft(_words(whole)):
            yield first, [re.sub(r"\$(\w+)", lambda name: known.get(name[1], name[0]), word) for word in words]
        whole = ""


def _words(line: str) -> list[str]:
    try:
        return shlex.split(re.sub(r"\[--key value \.\.\.\]|\[(?=--)|(?<=[\w.])\](?=\s|$)", "", line), comments=True)
    except ValueError:
        return line.split() if line.lstrip().startswith("sft ") else []


def _behind_sft(words: list[str]) -> Iterator[list[str]]:
    """The words behind each `sft` that is a command (behind variables, srun, or `torchrun ... -m`)."""
    while "sft" in words:
        place = words.index("sft")
        before, words = words[:place], words[place + 1 :]
        last = max((n for n, word in enumerate(before) if word in ENDS), default=-1)
        if before[last + 1 :] and before[last + 1] in ("pip", "trl", "import", "from"):
            continue
        end = next((n for n, word in enumerate(words) if word in ENDS), len(words))
        yield [word for word in words[:end] if word != "..."]
        words = words[end:]
