"""Where the Hub's files are kept here, and what to do where nothing can be written there."""

from __future__ import annotations

import errno
from pathlib import Path

from sft.utils.errors import causes
from sft.utils.files import unwritable

REMEDY = "set HF_HOME to a folder that can be written to"
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def cannot_fetch(what: str, name: str, *, dataset: bool = False) -> str | None:
    """Why `name`, which isn't in the cache, can't be brought there, as a sentence; None where it can.

    Without a network nothing is fetched, whatever the cache's folder allows: None too.
    """
    from huggingface_hub import constants

    folders: list[str | Path] = [constants.HF_HUB_CACHE, *([Path(constants.HF_HOME) / "datasets"] if dataset else [])]
    for folder in folders if not constants.HF_HUB_OFFLINE else []:
        if why := unwritable(folder):
            return f"the {what} {name} isn't in the cache, and {folder} can't be written to ({why}): {REMEDY}"
    return None


def remedy(error: BaseException) -> str:
    """What to add to a sentence about files of the Hub, where the cache's folder refused them; else nothing."""
    refused = any(isinstance(seen, OSError) and seen.errno in _REFUSED for seen in causes(error))
    return f"; {REMEDY}" if refused else ""
