"""What `model.chat_template` may say: the name of a known family, a file, or the template itself."""

from __future__ import annotations

import os
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from sft.recipe.problems import nearest

OWN = ("chatml", "phi4-mini")
LARGEST = 1_000_000
"""Bytes of a template's file: the longest that models come with have a tenth of it."""


@cache
def trl_templates() -> dict[str, Path]:
    """The templates that TRL brings, and their `..._training` twins, by name. TRL itself isn't imported: that takes
    seconds."""
    spec = find_spec("trl")
    folders = [Path(folder) / "chat_templates" for folder in (spec.submodule_search_locations or [])] if spec else []
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.jinja"))}


def families() -> list[str]:
    """Names that `model.chat_template` knows."""
    return sorted({*OWN, *(name for name in trl_templates() if not name.endswith("_training"))})


def family(name: str) -> str | None:
    """The known family that is meant: `Qwen2.5` is `qwen2_5`."""
    return next((known for known in families() if _bare(known) == _bare(name)), None)


def _bare(name: str) -> str:
    return re.sub(r"[-_. ]", "", name.lower())


def template_asked_for(value: str) -> tuple[str, str | None]:
    """(the family's name or the template's text, None), or what is wrong with `value`, put second.

    The text of a file is what the recipe says from here on, whatever becomes of the file.
    """
    if "{{" in value or "{%" in value:
        return value, None
    known = family(value)
    if known is not None:
        return known, None
    path = Path(os.path.expanduser(value))
    try:
        if not path.is_file():
            hint = nearest(value, families()) or f"; known are {', '.join(families())}"
            return value, f"is no template, no file and no known family{hint}"
        if path.stat().st_size > LARGEST:
            return value, f"is a file of {path.stat().st_size:,} bytes: no chat template"
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        return value, f"can't be read: {error}"
    return text, None if "{{" in text or "{%" in text else "is a file that holds no chat template"
