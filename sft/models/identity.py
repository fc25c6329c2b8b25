"""What a checkpoint's content is known by: the hashes of its files, or the commit of a Hub repository."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.models.checkpoint import check_checkpoint, json_object
from sft.tokenizers.load import check_named, names_folder
from sft.utils.errors import UserError, first_line
from sft.utils.hashes import folder_hashes
from sft.utils.hub_ask import hub_or_cache
from sft.utils.hub_cache import remedy

if TYPE_CHECKING:
    from sft.recipe.schema import Recipe

_DECISIVE = ("config.json", "*.safetensors", "pytorch_model*.bin")


def checkpoint_identity(name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """JSON that changes with the weights or the configuration: `files` by hash for a folder, `commit` for a Hub id.

    Raises:
        UserError: when there is no such checkpoint, or a folder's is cut off.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        check_checkpoint(folder)
        return {"files": folder_hashes(folder, _DECISIVE)}
    if names_folder(name_or_path):
        raise UserError(f"no model folder at {name_or_path}")
    return {"hub": name_or_path, "commit": resolved_commit(name_or_path, revision)}


def resolved_commit(repo_id: str, revision: str | None = None) -> str:
    """The commit that a Hub model's revision stands for now (offline: in the local cache).

    Raises:
        UserError: when the Hub doesn't have it, or can't be reached and the cache doesn't have it either.
    """
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        with hub_or_cache(repo_id, revision):
            path = cached_file(repo_id, "config.json", revision=revision)
    except Exception as error:  # transformers raises OSError, huggingface_hub its own, httpx's
        raise UserError(f"the model {repo_id} can't be found: {first_line(error)}{remedy(error)}") from error
    commit = extract_commit_hash(path, None)
    if commit is None:
        raise UserError(f"the model {repo_id}: the Hub names no commit for {revision or 'its main branch'}")
    return str(commit)


def start_identity(recipe: Recipe) -> dict[str, Any]:
    """What the first model of a run follows from: a checkpoint's content, or a configuration and the seed.

    A folder's name and place don't matter, nor those of its tokenizer, whose content is part of the prepared data.
    """
    section = recipe.model
    if section.config is not None:
        return {"config": section.config, "seed": recipe.seed}
    found = checkpoint_identity(str(section.model_name_or_path), section.model_revision)
    return {**found, "dtype": section.dtype}


def check_there(name: str, revision: str | None = None) -> None:
    """Raise UserError unless there is a checkpoint of that name, whole as far as no weights tell it."""
    if Path(name).is_dir():
        check_checkpoint(name)
        if not json_object((Path(name) / "config.json").read_bytes(), Path(name) / "config.json").get("model_type"):
            raise UserError(f"{name}/config.json names no model_type, so no model can be made")
    else:
        check_named(name, "model", revision)
