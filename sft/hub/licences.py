"""Licences of what a model was made from, and whether they let it be published as the card says."""

from __future__ import annotations

import re
from typing import Any

_ONLY_SOME_USES = re.compile(r"(^|[-_ ])nc([-_ ]|$)|non-?commercial|research[-_ ]only", re.IGNORECASE)
_ANY_USE = ("mit", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "unlicense", "openrail", "cc-by-4.0")


def contradictions(licence: str | None, sources: list[dict[str, Any]]) -> list[str]:
    """A sentence for each data set whose licence doesn't allow all that the model's does.

    Args:
        licence: the model's, as the card's metadata say; None: none is stated.
        sources: name and license of each, as `provenance.run_record` has them.
    """
    if licence not in _ANY_USE:
        return []
    found = {
        (source["name"], source["license"]) for source in sources if _ONLY_SOME_USES.search(source["license"] or "")
    }
    return [
        f"{name} is licensed {theirs}, which doesn't allow every use that {licence} does: state the model's licence "
        "accordingly before publishing."
        for name, theirs in sorted(found)
    ]
