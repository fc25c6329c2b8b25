"""Models that have learned a vector for each position know no position beyond; rotary ones and SambaY know any."""

from __future__ import annotations

from typing import Any

from torch import nn

from sft.utils.errors import UserError

_OFFSET = 2
"""Rows that OPT's and its relatives' tables have before the first position."""


def learned_positions(model: Any) -> int | None:
    """How many positions a model has learned vectors for; None where it needs none."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if known is None:
        return None
    tokens = model.get_input_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens]
    return known if any(table.num_embeddings in (known, known + _OFFSET) for table in tables) else None


def check_positions(model: Any, longest: int) -> None:
    """Raise UserError where a document of `longest` tokens goes beyond the positions that the model has learned."""
    known = learned_positions(model)
    if known is not None and longest > known:
        raise UserError(
            f"The longest of the rows has {longest:,} tokens, but the model has learned {known:,} positions and knows "
            f"none beyond: set train.max_length to {known} or less."
        )
