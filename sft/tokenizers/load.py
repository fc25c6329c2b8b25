"""A tokenizer by folder, Hub id or the name of the built-in one, or one sentence that says why not."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.recipe.chat_templates import families
from sft.recipe.values import HUB_ID
from sft.tokenizers.templates import CHATML_END, CHATML_TEMPLATE, known_template
from sft.utils.errors import UserError, first_line
from sft.utils.hub_cache import cannot_fetch, remedy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft.recipe.schema import ModelSection

TINY_TOKENIZER = "tiny"
NO_OWNERS = ("models", "datasets", "spaces", "docs", "api")
"""Pages of the Hub's own, which nobody can be called."""
ASK_SECONDS = 10

log = logging.getLogger(__name__)


def load_tokenizer(name_or_path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id, or the built-in one (`tiny`).

    Raises:
        UserError: when there is none, or it can't be read.
    """
    if name_or_path == TINY_TOKENIZER:
        from sft.tokenizers.tiny import build_tokenizer

        return build_tokenizer()
    path = Path(name_or_path)
    if path.exists() and not (path / "tokenizer_config.json").exists() and not (path / "tokenizer.json").exists():
        raise UserError(f"{name_or_path} holds no tokenizer (no tokenizer_config.json); set model.tokenizer")
    refuse_missing_folder(name_or_path, "tokenizer", "model.tokenizer")
    try:
        tokenizer = _as_the_file_says(name_or_path, revision)
    except Exception as error:
        reason = f"{first_line(error)}{remedy(error)}"
        raise UserError(f"the tokenizer {name_or_path} can't be loaded: {reason}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def start_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer that a run starts with, with the recipe's chat template; its stages hand it on unchanged."""
    name, revision = section.tokenizer, None
    if not name:
        name, revision = str(section.model_name_or_path), section.model_revision
    tokenizer = load_tokenizer(name, revision=revision)
    if section.chat_template is not None:
        known = section.chat_template in families()
        template = known_template(section.chat_template) if known else section.chat_template
        lacks_end = template == CHATML_TEMPLATE and CHATML_END not in tokenizer.get_vocab()
        # Spelled out in other tokens it would end nothing: an answer ends with the end of text there.
        tokenizer.chat_template = template.replace(f"'{CHATML_END}'", "eos_token") if lacks_end else template
    return tokenizer


def _as_the_file_says(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of `tokenizer.json`, whatever class its configuration names; where there is none, of that class.

    transformers 5 builds a named class anew from vocabulary and merges: of Phi-4-mini's tokenizer, which calls itself
    GPT2Tokenizer, it loses the split at digits and line ends, and texts get other tokens than the model was trained on.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import cached_file

    whole = cached_file(name, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    kind: Any = AutoTokenizer if whole is None else PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(name, revision=revision)
    return tokenizer


def refuse_missing_folder(name_or_path: str, what: str, key: str) -> None:
    """A path that isn't there would otherwise be looked up on the Hub, with a confusing error."""
    if names_folder(name_or_path) and not Path(name_or_path).expanduser().exists():
        raise UserError(f"{key}: no {what} folder at {name_or_path}")


def names_folder(name: str) -> bool:
    """Whether `name` can only be a folder's: it is written like a path, or begins with a folder that is here, or with
    a word that is no owner on the Hub."""
    first = name.split("/")[0]
    like_a_path = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
    return like_a_path or ("/" in name and (first in NO_OWNERS or Path(first).is_dir()))


def check_named(name: str, what: str, revision: str | None = None, *, hub: bool = True) -> None:
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
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    names = ("config.json", "tokenizer_config.json", "tokenizer.json")
    if any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in names):
        return
    if why := cannot_fetch(what, name):
        raise UserError(why)
    try:
        HfApi().model_info(name, revision=revision, timeout=ASK_SECONDS)
    except RevisionNotFoundError as error:
        raise UserError(f"the {what} {name} has no revision {revision} on the Hub") from error
    except RepositoryNotFoundError as error:
        reason = f"no {what} called {name}: no such folder here, and the Hub has none, or it is private: set HF_TOKEN"
        raise UserError(reason) from error
    except HfHubHTTPError as error:  # the Hub's own trouble, which may be over when the run asks again
        log.info("%s: the Hub answers %s", name, first_line(error))
    except Exception as error:  # httpx's and huggingface_hub's, by its version
        reason = f"no {what} folder {name} here, nor in the cache, and the Hub can't be reached ({first_line(error)})"
        raise UnreachableError(reason) from error


class UnreachableError(UserError):
    """The Hub would have to be asked, and can't be."""
