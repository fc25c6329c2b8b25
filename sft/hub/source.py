"""What is exported: a model and a tokenizer, from memory, a model folder or what a stage handed on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.hub.provenance import recorded_recipe
from sft.models.base import BASE, base_folder
from sft.recipe.paths import RunPaths
from sft.utils.errors import UserError, first_line
from sft.utils.files import read_json

if TYPE_CHECKING:
    from sft.recipe.schema import Recipe


@dataclass
class Source:
    """A model to export.

    Attributes:
        model: a causal language model, or a PeftModel around one.
        tokenizer: None: the folder will have none.
        dtype: what its weights are to be stored in, "float32" or "bfloat16" (fp32 parameters of a SambaY model aside).
        folder: where it was loaded from; None: from memory.
        run: the folder of the run it belongs to, if any.
        base: of an adapter: the Hub id or folder of its base model, if there is one.
        merges: an adapter is written merged into the weights.
    """

    model: Any
    tokenizer: Any
    dtype: str
    folder: Path | None = None
    run: Path | None = None
    base: str | None = None
    merges: bool = False

    @property
    def is_adapter(self) -> bool:
        """Whether the model is an adapter on a base model."""
        return hasattr(self.model, "peft_config")

    @property
    def stage(self) -> str | None:
        """The stage of the run whose model it is; None where its place doesn't tell."""
        inside = self.folder is not None and self.run is not None and find_run(self.folder) == self.run.resolve()
        return self.folder.resolve().parent.name if inside and self.folder else None


def open_source(source: str | Path | tuple[Any, Any], run: Path | None = None) -> Source:
    """Load what `source` names.

    Args:
        source: a model or adapter folder, or (model, tokenizer).
        run: folder of the run; found by itself for `<run>/stages/<name>/final`.

    Raises:
        UserError: when there is no model, or it can't be loaded.
    """
    if isinstance(source, tuple):
        model, tokenizer = source
        return Source(model, tokenizer, held_dtype(model), run=run, base=_base_name(model))
    folder = Path(handed_on(str(source)))
    if not folder.is_dir():
        raise UserError(f"no model folder at {folder}")
    run = run or find_run(folder)
    tokenizer = _tokenizer_of(folder)
    if is_adapter(folder):
        return _open_adapter(folder, tokenizer, run)
    from sft.models.load import load_checkpoint

    recipe = recipe_of(run)
    trust = recipe.model.trust_remote_code if recipe else False
    model = load_checkpoint(str(folder), dtype="auto", trust_remote_code=trust)
    # Full fine-tuning hands on its float32 masters; the recipe says what the model is held in otherwise.
    return Source(model, tokenizer, recipe.model.dtype if recipe else held_dtype(model), folder, run)


def handed_on(name: str) -> str:
    """The folder with a stage's model where a stage's own folder is named; else `name`, without its `~`."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    holds_none = not is_adapter(folder) and not (folder / "config.json").exists()
    return str(folder / "final" if holds_none and (folder / "final").is_dir() else folder)


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter, and no whole weights."""
    return (Path(folder) / "adapter_config.json").is_file()


def find_run(folder: Path) -> Path | None:
    """The run that `folder` (`<run>/stages/<name>/final` or a checkpoint beside it) belongs to."""
    parents = folder.resolve().parents
    if len(parents) > 2 and parents[1].name == "stages" and (parents[2] / "resolved.yaml").exists():
        return parents[2]
    return None


def recipe_of(run: Path | None) -> Recipe | None:
    """The resolved recipe of a run, if it is there."""
    if run is None or recorded_recipe(run) is None:
        return None
    from sft.recipe import load_recipe

    return load_recipe(run / "resolved.yaml")


def _open_adapter(folder: Path, tokenizer: Any, run: Path | None) -> Source:
    """An adapter on its base model, whose weights stay in their file until they are read."""
    from peft import PeftModel

    try:
        base, dtype, name = _open_base(folder, tokenizer, run)
    except UserError as error:
        raise UserError(f"{folder} is an adapter, and its base model can't be had: {error}") from error
    try:
        model = PeftModel.from_pretrained(base, str(folder))
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise UserError(f"the adapter {folder} doesn't fit its base model: {first_line(error)}") from error
    return Source(model, tokenizer, dtype, folder, run, name)


def _open_base(folder: Path, tokenizer: Any, run: Path | None) -> tuple[Any, str, str | None]:
    """The base model as its file holds it, the dtype to store it in, and its name if it has one outside this run."""
    from sft.models.load import load_checkpoint, load_model

    recipe = recipe_of(run)
    name: str | None = None
    if (folder / BASE).exists():
        if recipe is None or run is None:
            raise UserError("it lies outside of the run that made it, or that run's resolved.yaml is gone; put it back")
        made = base_folder(RunPaths(recipe.model_copy(update={"output_dir": str(run)})), folder)
        if made is None:
            held = "auto" if recipe.model.config is None else "float32"
            section = recipe.model.model_copy(update={"dtype": held})
            start = load_model(section, tokenizer, seed=recipe.seed)
            return start, recipe.model.dtype, recipe.model.model_name_or_path
        name = str(made.resolve())
    name = name or read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not name:
        raise UserError("adapter_config.json doesn't say what its base model is")
    trust = recipe.model.trust_remote_code if recipe else False
    base = load_checkpoint(name, dtype="auto", trust_remote_code=trust)
    return base, held_dtype(base), _loadable(name)


def _loadable(name: str | None) -> str | None:
    """A base model's name that means the same from everywhere: of a folder the whole path."""
    return os.path.abspath(os.path.expanduser(name)) if name and Path(name).expanduser().is_dir() else name


def _tokenizer_of(folder: Path) -> Any:
    from sft.tokenizers.load import load_tokenizer

    has_one = (folder / "tokenizer_config.json").exists() or (folder / "tokenizer.json").exists()
    return load_tokenizer(str(folder)) if has_one else None


def held_dtype(model: Any) -> str:
    """The dtype that most of the model's weights have.

    Raises:
        UserError: when it is none that a model is stored in here.
    """
    counts: dict[str, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            name = str(parameter.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + parameter.numel()
    name = max(counts, key=lambda name: counts[name]) if counts else "float32"
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"the model is stored in {name}; export knows float32, bfloat16 and float16")
    return name


def _base_name(model: Any) -> str | None:
    """The base model's name in a PeftModel's configuration."""
    configs = getattr(model, "peft_config", None) or {}
    return _loadable(next((config.base_model_name_or_path for config in configs.values()), None))
