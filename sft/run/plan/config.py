"""A model's shape without the libraries that load it: from the recipe, its folder, the Hub's cache, or the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.run.plan.shape import Shape
from sft.utils.errors import UserError, first_line

if TYPE_CHECKING:
    from sft.recipe.schema import ModelSection

PUBLISHED = "microsoft/Phi-4-mini-flash-reasoning"
"""Whose shape needn't be looked up."""
TINY_VOCABULARY = 448
"""Rows of the embedding of a model that is made for the built-in tokenizer (tests count them)."""


def shape_of(section: ModelSection) -> Shape:
    """The shape of the model that a recipe starts from. Raises UserError where it can't be found out."""
    if section.config is not None:
        config = dict(section.config)
        if "vocab_size" not in config:
            config["vocab_size"] = _vocabulary(section.tokenizer)
        return Shape.of(config, "model.config")
    name = section.model_name_or_path
    assert name is not None
    if name == PUBLISHED and section.model_revision is None:
        return Shape()
    folder = Path(name)
    file = folder / "config.json" if folder.is_dir() else _from_hub(name, "config.json", section.model_revision)
    return Shape.of(_read(file), name)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read, and tells the model's shape: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object: it should tell the model's shape.")
    return content


def _from_hub(name: str, file: str, revision: str | None = None) -> Path:
    """A file of a repository in the cache, where it is fetched to if it isn't there."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, file, revision=revision)
        return Path(found if isinstance(found, str) else hf_hub_download(name, file, revision=revision))
    except Exception as error:  # huggingface_hub's and httpx's, by its version
        raise UserError(
            f"{file} of {name}, which tells the model's shape, isn't here and can't be fetched: {first_line(error)}"
        ) from error


def _vocabulary(tokenizer: str | None) -> int:
    """Rows of the embedding of a model made for a tokenizer: its tokens, rounded up to 64s."""
    if tokenizer == "tiny":
        return TINY_VOCABULARY
    if tokenizer == PUBLISHED:
        return Shape.vocab_size
    name = tokenizer or ""
    folder = Path(name)
    file = folder / "tokenizer.json" if folder.is_dir() else _from_hub(name, "tokenizer.json")
    content = _read(file)
    ids = [*content.get("model", {}).get("vocab", {}).values(), *(x["id"] for x in content.get("added_tokens", []))]
    return (max((int(i) for i in ids if isinstance(i, int)), default=0) + 64) // 64 * 64
