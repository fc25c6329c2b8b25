"""The weights of a document's tokens, from what its row says: one number, or one for each message or each token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.data.read.message import Message, from_json
from sft.data.read.row import BadRow
from sft.data.tokenize.tokens import Owned

REASON = "weights"


def token_weights(found: Any, messages: Sequence[Message], owned: Owned, column: str) -> NDArray[np.float64] | BadRow:
    """The weight (n,) of each token of a document, or why what its row says in `column` can't be used.

    A number is for all of them. A list is for the row's messages, as many as there are (a system message of the
    recipe's own in front of them is none of the row's), or else for all tokens of the document; null may stand in it
    for what isn't trained. A text that isn't read to its end may have more weights than tokens.
    """
    found = from_json(found)
    given = found if isinstance(found, list) else [found]
    numbers = [math.nan if number is None and given is found else _number(number) for number in given]
    if None in numbers:
        said = given[numbers.index(None)]
        return BadRow(REASON, f"'{column}' holds {said!r:.40}, expected a finite number from 0 up")
    weights, owners = np.array(numbers, dtype=np.float64), owned.owners
    missing = len(messages) - len(weights)
    if given is not found:
        weights = np.broadcast_to(weights, owners.shape)
    elif missing == 0 or (missing == 1 and messages[0]["role"] == "system"):
        weights = np.concatenate([np.ones(missing), weights, np.ones(1)])[owners]
    elif len(weights) < len(owners) or (owned.whole and len(weights) > len(owners)):
        told = f"{len(weights)} weights for {len(messages)} messages and {len(owners)} tokens"
        return BadRow(REASON, f"'{column}' has {told}: there must be as many as one or the other")
    weights = weights[: len(owners)]
    if np.isnan(weights[owned.tokens.mask.astype(bool)]).any():
        return BadRow(REASON, f"'{column}' is null where a token is trained")
    return np.nan_to_num(weights, nan=1.0)


def _number(found: Any) -> float | None:
    """A finite number from 0 up, which may be given as text (in CSV all is); None for anything else."""
    try:
        number = math.nan if isinstance(found, bool) else float(found)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number >= 0 else None
