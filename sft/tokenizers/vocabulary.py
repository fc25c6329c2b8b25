"""Whether a tokenizer's ids are ids of a model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.recipe.values import HUB_ID
from sft.utils.errors import UserError

if TYPE_CHECKING:
    from sft.recipe.schema import ModelSection


def check_vocabulary(model: Any, largest: int) -> None:
    """Raise UserError where an id beyond the model's vocabulary would be looked up; `largest`: the largest id."""
    refuse_beyond(known_ids(model), largest)


def known_ids(model: Any) -> int:
    """How many ids a model has embeddings for."""
    embeddings = model.get_input_embeddings()
    # Of weights that are split over processes, each holds a part only.
    return int(getattr(embeddings, "num_embeddings", embeddings.weight.shape[0]))


def outside(model: Any, ids: Sequence[int]) -> str | None:
    """What is wrong with ids that somebody asks with, if one of them isn't the model's."""
    known = known_ids(model)
    wrong = next((token for token in (min(ids), max(ids)) if not 0 <= token < known), None)
    return None if wrong is None else f"token {wrong} isn't in the vocabulary (0 to {known - 1})"


def refuse_beyond(rows: int, largest: int) -> None:
    """The same for a model with embeddings for `rows` ids."""
    if largest >= rows:
        raise UserError(
            f"The tokenizer makes token {largest}, but the model's vocabulary ends at {rows - 1}: they don't belong "
            "together; check model.tokenizer, or model.config.vocab_size of a model from scratch."
        )


def vocabulary_size(section: ModelSection) -> int | None:
    """How many ids the model of a recipe knows, as its configuration says; None where that isn't at hand: a model from
    scratch gets as many as its tokenizer needs, and one that isn't there is told of when it is loaded."""
    if section.model_name_or_path is None:
        return _size(section.config)
    path: Any = Path(section.model_name_or_path) / "config.json"
    if not Path(section.model_name_or_path).is_dir():
        if not re.fullmatch(HUB_ID, section.model_name_or_path):
            return None
        from transformers.utils import cached_file

        revision = section.model_revision
        options: dict[str, Any] = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
        options["_raise_exceptions_for_connection_errors"] = False
        path = cached_file(section.model_name_or_path, "config.json", revision=revision, **options)
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return None
    return _size(config.get("text_config") or config if isinstance(config, dict) else None)


def _size(config: Any) -> int | None:
    size = config.get("vocab_size") if isinstance(config, dict) else None
    return size if isinstance(size, int) else None
