"""A prepared row cut into the pieces a preview shows. They come from the store: the mask shown is the one trained."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

Kind = Literal["trained", "context", "boundary"]
# What would move the cursor or colour the terminal; newlines and tabs may stay.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring tokens of one kind. `boundary` is a document's first token, which nothing predicts."""

    kind: Kind
    ids: list[int]
    text: str


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a row.

    `number` counts from 1 in its row, `trained` is how many of its tokens are trained. `whole` is its length before it
    was cut at max_length; None where it wasn't.
    """

    number: int
    name: str
    tokens: int
    trained: int
    segments: list[Segment]
    whole: int | None = None

    @property
    def missing(self) -> int:
        """Tokens that were cut off."""
        return 0 if self.whole is None else self.whole - self.tokens


def documents_of(
    row: Mapping[str, Any], tokenizer: Any, cut: Mapping[tuple[str, int], int] | None = None
) -> Iterator[Document]:
    """The documents of a prepared row, in order. `cut`: whole lengths of those that were cut (`lookup.cut_lengths`)."""
    ids, mask = np.asarray(row["input_ids"]), np.asarray(row["assistant_masks"])
    start = 0
    for number, (length, name) in enumerate(zip(row["seq_lengths"], row["document_ids"], strict=True), start=1):
        part = slice(start, start + length)
        segments = _segments(ids[part], mask[part], tokenizer)
        yield Document(number, name, length, int(mask[part].sum()), segments, (cut or {}).get((name, length)))
        start += length


def _segments(ids: np.ndarray, mask: np.ndarray, tokenizer: Any) -> list[Segment]:
    kinds: list[Kind] = ["trained" if trained else "context" for trained in mask.tolist()]
    kinds[0] = "boundary"
    changes = [0, *(i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]), len(kinds)]
    segments = []
    for start, end in pairwise(changes):
        tokens = ids[start:end].tolist()
        text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        segments.append(Segment(kinds[start], tokens, _visible(text)))
    return segments


def _visible(text: str) -> str:
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)
