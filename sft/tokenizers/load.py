"""A tokenizer by folder, Hub id or the name of the built-in one, or one sentence that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.recipe.chat_templates import families
from sft.tokenizers.templates import known_template
from sft.utils.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft.recipe.schema import ModelSection

TINY_TOKENIZER = "tiny"


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
        raise UserError(f"the tokenizer {name_or_path} can't be loaded: {first_line(error)}") from error
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
        tokenizer.chat_template = known_template(section.chat_template) if known else section.chat_template
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
    looks_local = name_or_path.startswith(("/", "./", "../", "~")) or name_or_path.count("/") > 1
    if looks_local and not Path(name_or_path).expanduser().exists():
        raise UserError(f"{key}: no {what} folder at {name_or_path}")
