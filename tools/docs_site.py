"""mkdocs' hook: pages that stand outside of docs/ join the site, and links lead where they lead in the repository.

So a page reads the same on the site, on a code host and in an editor. A link may lead to a page of docs/, or to a file
that `BESIDE` names; the site has that, under its path in the repository.
"""

from __future__ import annotations

import os.path
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BESIDE = (
    "configs/*/README.md",
    "configs/*/*.yaml",
    "configs/deepspeed/*.json",
    "data_recipes/README.md",
    "data_recipes/*.yaml",
    "kernels/benchmarks/results/*.json",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)
"""What the site has beside docs/."""
LINK = re.compile(r"(!?\[[^\[\]]*\]\()([^()\s]+)(\))")
FENCE = re.compile(r"(^ *```.*?^ *```[^\n]*$)", re.DOTALL | re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Take in what stands beside docs/."""
    from mkdocs.structure.files import File

    for path in beside():
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as the site has them."""
    source = page.file.src_uri
    here = source if any(ROOT.joinpath(source) == path for path in beside()) else f"docs/{source}"

    def led(match: re.Match[str]) -> str:
        return f"{match[1]}{site_link(here, match[2])}{match[3]}"

    parts = FENCE.split(markdown)
    return "".join(part if index % 2 else LINK.sub(led, part) for index, part in enumerate(parts))


def beside() -> list[Path]:
    """The files that the site has beside docs/."""
    return sorted(path for pattern in BESIDE for path in ROOT.glob(pattern))


def site_link(here: str, link: str) -> str:
    """A link of the page at `here` in the repository, between the same two files of the site."""
    target, hash_, anchor = link.partition("#")
    if not target or ":" in target:
        return link
    there = os.path.normpath(os.path.join(os.path.dirname(here), target))
    start = os.path.dirname(_on_site(here))
    return f"{os.path.relpath(_on_site(there), start or '.')}{hash_}{anchor}"


def _on_site(path: str) -> str:
    return path.removeprefix("docs/")
