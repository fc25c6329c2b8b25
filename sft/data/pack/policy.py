"""Which documents may be trained on: not longer than a row, and with something to learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sft.data.tokenize.tokens import Tokens

Policy = Literal["drop", "truncate", "error"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a document: kept (possibly cut), or dropped for `reason`."""

    tokens: Tokens | None
    reason: str | None = None
    truncated: bool = False


def judge(tokens: Tokens, max_length: int | None, over_length: Policy) -> Verdict:
    """Apply the length policy, then demand a supervised token (a truncated document may have lost all of them).

    With `over_length="error"` a document that is too long is dropped for the reason `over_length` as well; the caller
    stops there.
    """
    truncated = False
    if max_length is not None and len(tokens.ids) > max_length:
        if over_length != "truncate":
            return Verdict(None, "over_length")
        tokens, truncated = Tokens(tokens.ids[:max_length], tokens.mask[:max_length]), True
    if tokens.supervised == 0:
        return Verdict(None, "no_supervised_token", truncated)
    return Verdict(tokens, truncated=truncated)
