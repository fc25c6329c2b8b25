"""A tokenizer by folder, Hub id or the name of the built-in one, or one sentence that says why not."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.recipe.chat_templates import families
from sft.recipe.values import HUB_ID
from sft.tokenizers.templates import CHATML_END, CHATML_TEMPLATE, known_template
from sft.utils.errors import UserError, first_line
from sft.utils.hub_ask import ask_hub, hub_or_cache
from sft.utils.hub_cache import cannot_fetch, data_set_is_cached, is_cached, remedy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft.recipe.schema import ModelSection

TINY_TOKENIZER = "tiny"
NO_OWNERS = ("models", "datasets", "spaces", "docs", "api")
"""Pages of the Hub's own, which nobody can be called."""


def load_tokenizer(name_or_path: str, *, revision: str | None = None, fetch: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id, or the built-in one (`tiny`); without `fetch` the Hub isn't asked.

    Raises:
        UserError: when there is none, or it can't be read.
    """
    if name_or_path == TINY_TOKENIZER:
        from sft.tokenizers.tiny import build_tokenizer

        return build_tokenizer()
    path = Path(name_or_path)
    if path.exists() and not (path / "tokenizer_config.json").exists() and not (path / "tokenizer.json").exists():
        raise UserError(f"{name_or_path} holds no tokenizer (no tokenizer_config.json); set model.tokenizer")
    if fetch:
        refuse_missing(name_or_path, "tokenizer", "model.tokenizer", revision)
    try:
        tokenizer = _as_the_file_says(name_or_path, revision, fetch)
    except Exception as error:
        reason = f"{first_line(error)}{remedy(error)}"
        raise UserError(f"the tokenizer {name_or_path} can't be loaded: {reason}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def start_tokenizer(section: ModelSection, *, fetch: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer that a run starts with, with the recipe's chat template; its stages hand it on unchanged. Without
    `fetch` the Hub isn't asked."""
    name, revision = section.tokenizer, None
    if not name:
        name, revision = str(section.model_name_or_path), section.model_revision
    tokenizer = load_tokenizer(name, revision=revision, fetch=fetch)
    if section.chat_template is not None:
        known = section.chat_template in families()
        template = known_template(section.chat_template) if known else section.chat_template
        lacks_end = template == CHATML_TEMPLATE and CHATML_END not in tokenizer.get_vocab()
        # Spelled out in other tokens it would end nothing: an answer ends with the end of text there.
        tokenizer.chat_template = template.replace(f"'{CHATML_END}'", "eos_token") if lacks_end else template
    return tokenizer


def _as_the_file_says(name: str, revision: str | None, fetch: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of `tokenizer.json`, whatever class its configuration names; where there is none, of that class.

    transformers 5 builds a named class anew from vocabulary and merges: of Phi-4-mini's tokenizer, which calls itself
    GPT2Tokenizer, it loses the split at digits and line ends, and texts get other tokens than the model was trained on.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import cached_file

    options: dict[str, Any] = {"revision": revision, "local_files_only": not fetch}
    with hub_or_cache(name, revision) if fetch else nullcontext():
        whole = cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **options)
        kind: Any = AutoTokenizer if whole is None else PreTrainedTokenizerFast
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(name, **options)
    return tokenizer


def refuse_missing(name_or_path: str, what: str, key: str, revision: str | None = None) -> None:
    """Raise UserError for a folder or Hub id that isn't there, at once: transformers would look a path up on the Hub,
    with a confusing error, and try again and again where that can't be reached."""
    if names_folder(name_or_path) and not Path(name_or_path).expanduser().exists():
        raise UserError(f"{key}: no {what} folder at {name_or_path}")
    check_named(name_or_path, what, revision)


def names_folder(name: str) -> bool:
    """Whether `name` can only be a folder's: it is written like a path, or begins with a folder that is here, or with
    a word that is no owner on the Hub."""
    first = name.split("/")[0]
    like_a_path = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
    return like_a_path or ("/" in name and (first in NO_OWNERS or Path(first).is_dir()))


def check_named(name: str, what: str, revision: str | None = None, *, hub: bool = True, dataset: bool = False) -> None:
    """Look whether there is a `what` called `name`, without loading it: a folder, or, with `hub`, a repository.

    The Hub is asked once, and only for what isn't in the cache. Raises UserError when the answer is no, and
    UnreachableError where the Hub can't be asked.
    """
    if Path(name).expanduser().exists():
        return
    if names_folder(name):
        raise UserError(f"no {what} at {name}: no such file or folder")
    if not hub:
        return
    if not re.fullmatch(HUB_ID, name):
        raise UserError(f"{name!r} is no folder here, and no Hub id can be called so")
    if data_set_is_cached(name) if dataset else is_cached(name, revision):
        return
    if why := cannot_fetch(what, name, dataset=dataset):
        raise UserError(why)
    ask_hub(what, name, revision, dataset=dataset)
