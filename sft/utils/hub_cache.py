"""Where the Hub's files are kept here, and what to do where nothing can be written there."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from sft.recipe.values import HUB_ID
from sft.utils.errors import causes
from sft.utils.files import unwritable

REMEDY = "set HF_HOME to a folder that can be written to"
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def is_cached(repo_id: str, revision: str | None = None) -> bool:
    """Whether files of a model or tokenizer are kept here; of a path that is no Hub id, there are none."""
    from huggingface_hub import try_to_load_from_cache

    if not re.fullmatch(HUB_ID, repo_id):
        return False
    names = ("config.json", "tokenizer_config.json", "tokenizer.json", "adapter_config.json")
    return any(isinstance(try_to_load_from_cache(repo_id, name, revision=revision), str) for name in names)


def lacks_template(repo_id: str, revision: str | None = None) -> bool:
    """Whether the cache knows of a tokenizer that the Hub has no file of a chat template beside it."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    return try_to_load_from_cache(repo_id, "chat_template.jinja", revision=revision) is _CACHED_NO_EXIST


def data_set_is_cached(repo_id: str) -> bool:
    """Whether rows of a data set are kept here, by `datasets`."""
    return (_data_sets() / repo_id.replace("/", "___").lower()).exists()


def _data_sets() -> Path:
    from huggingface_hub import constants

    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser()


def cannot_fetch(what: str, name: str, *, dataset: bool = False) -> str | None:
    """Why `name`, which isn't in the cache, can't be brought there, as a sentence; None where it can.

    Without a network nothing is fetched, whatever the cache's folder allows: None too.
    """
    from huggingface_hub import constants

    folders: list[str | Path] = [constants.HF_HUB_CACHE, *([_data_sets()] if dataset else [])]
    for folder in folders if not constants.HF_HUB_OFFLINE else []:
        if why := unwritable(folder):
            return f"the {what} {name} isn't in the cache, and {folder} can't be written to ({why}): {REMEDY}"
    return None


def remedy(error: BaseException) -> str:
    """What to add to a sentence about files of the Hub, where the cache's folder refused them; else nothing."""
    refused = any(isinstance(seen, OSError) and seen.errno in _REFUSED for seen in causes(error))
    return f"; {REMEDY}" if refused else ""
