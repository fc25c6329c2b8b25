"""What a run left behind about itself, gathered for the manifest and the model card; parts may be missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sft.data.read.local import looks_local
from sft.recipe.published import published_recipe, secrets_of
from sft.utils.errors import UserError
from sft.utils.files import read_sealed, sha256_file, write_text
from sft.utils.secrets import published

# Settings of a stage that the card shows, by their names in the recipe.
TRAIN_KEYS = (
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "max_steps",
    "max_length",
    "packing",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "use_peft",
    "lora_r",
    "lora_alpha",
)
DATA_KEYS = (
    "rows",
    "documents",
    "packs",
    "tokens",
    "supervised_tokens",
    "max_document_length",
    "funnel",
    "inputs",
    "key",
)
EVALUATION_KEYS = (
    "suite",
    "pass_at_1",
    "interval",
    "problems",
    "samples",
    "pass_at_k",
    "verdicts",
    "cut_off",
    "tokens",
    "settings",
    "source",
    "of_problems",
)


def run_record(run: Path | None, stage: str | None = None) -> dict[str, Any] | None:
    """Recipe, stages, evaluations and environment of the run in folder `run`; None without a run.

    `stage`: of the model after this stage, which the later ones have nothing to do with. Secrets and the folders of
    this machine are taken out: the record is published.
    """
    if run is None:
        return None
    recipe = _recipe(run)
    names = [
        section["name"] for section in recipe.get("stages") or [] if isinstance(section, dict) and "name" in section
    ]
    names = names[: names.index(stage) + 1] if stage in names else names
    stages = [_stage(run, recipe, name) for name in names]
    environments = [told.pop("environment", None) for told in stages]
    record = {
        "name": recipe.get("name") or run.name,
        "description": recipe.get("description"),
        "seed": recipe.get("seed"),
        "start": _start(run, recipe),
        "stages": stages,
        "evaluations": _evaluations(run, ["start", *names]),
        "spaces": _spaces(recipe, [told["name"] for told in stages if told["done"]]),
        "environment": next((value for value in reversed(environments) if value), None),
    }
    cleaned: dict[str, Any] = published(record, _secrets(run, recipe))
    return cleaned


def write_recipe(run: Path | None, folder: Path) -> None:
    """Put the run's resolved recipe beside the weights as recipe.yaml, without secrets."""
    text = None if run is None else recorded_recipe(run)
    if run is not None and text is not None:
        write_text(folder / "recipe.yaml", published_recipe(text, _secrets(run, _recipe(run))))


def _secrets(run: Path, recipe: dict[str, Any]) -> tuple[str, ...]:
    given = run / "recipe.yaml"
    overrides = _json(run / "manifest.json").get("overrides") or []
    return secrets_of(recipe, given.read_text(encoding="utf-8") if given.is_file() else "", overrides)


def _start(run: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """The model that the run starts from. `kind`: `hub`, `folder` or `scratch`; None where nothing tells.

    What was found when the first stage was trained decides: a folder may be called like a Hub model.
    """
    section = recipe.get("model") or {}
    told = {key: section.get(key) for key in ("model_name_or_path", "tokenizer", "dtype")}
    name = told["model_name_or_path"]
    first = next((stage.get("name") for stage in recipe.get("stages") or [] if isinstance(stage, dict)), "")
    found = (_json(run / "stages" / str(first) / "manifest.json").get("parts") or {}).get("start") or {}
    told["model_name_or_path"] = name = found.get("hub") or name
    kinds = {"hub": "hub", "files": "folder", "config": "scratch"}
    kind = next((kind for key, kind in kinds.items() if key in found), None)
    if kind is None and name:
        kind = "folder" if looks_local(name) else "hub"
    elif kind is None and section.get("config") is not None:
        kind = "scratch"
    return {**told, "kind": kind}


def recorded_recipe(run: Path) -> str | None:
    """The text of the recipe that the run in folder `run` was made with; None where none is recorded.

    Raises UserError when it isn't what the run wrote: something else would be published.
    """
    path = run / "resolved.yaml"
    if not path.exists():
        return None
    manifest = read_sealed(run / "manifest.json")
    if (run / "manifest.json").exists() and (manifest or {}).get("resolved") != sha256_file(path):
        raise UserError(f"{path} and manifest.json are not what the run wrote: run `sft run` again to have them anew.")
    return path.read_text(encoding="utf-8")


def _recipe(run: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(recorded_recipe(run) or "{}")
    except yaml.YAMLError:  # nothing says what it should be, or it would have been refused
        return {}
    return value if isinstance(value, dict) else {}


def _stage(run: Path, recipe: dict[str, Any], name: str) -> dict[str, Any]:
    """One stage: settings from the recipe, counts and results from its manifest (`done` is false without one)."""
    section = next(stage for stage in recipe["stages"] if stage.get("name") == name)
    train = section.get("train") or {}
    manifest = _json(run / "stages" / name / "manifest.json")
    data = manifest.get("data") or {}
    return {
        "name": name,
        "done": bool(manifest),
        "train": {key: train[key] for key in TRAIN_KEYS if train.get(key) is not None},
        "steps": manifest.get("steps"),
        "epochs": manifest.get("epochs"),
        "final_loss": manifest.get("final_loss"),
        "validation": manifest.get("validation"),
        "average": manifest.get("average"),
        "world_size": manifest.get("world_size"),
        "sequence_parallel_size": manifest.get("sequence_parallel_size"),
        "counters": manifest.get("counters"),
        "data": {key: data[key] for key in DATA_KEYS if key in data},
        "sources": _sources(
            section.get("data") or {}, {str(told.get("source")): told for told in data.get("inputs") or ()}
        ),
        "environment": manifest.get("environment"),
    }


def _spaces(recipe: dict[str, Any], done: list[str]) -> list[str]:
    """The Spaces where trackio shows what the stages logged."""
    sections = [stage.get("train") or {} for stage in recipe.get("stages") or [] if stage.get("name") in done]
    return list(dict.fromkeys(train["trackio_space_id"] for train in sections if train.get("trackio_space_id")))


def _sources(section: dict[str, Any], read: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The sources of a section, those of the data recipes that it names among them; `read`: what was read, by name."""
    return [
        leaf
        for source in section.get("sources") or []
        for leaf in (_sources(source, read) if source.get("sources") else [_source(source, read)])
    ]


def _read(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a stage's data was read from, by name."""
    return {str(told.get("source")): told for told in data.get("inputs") or ()}


def _source(source: dict[str, Any], read: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A data source as the card names it: a Hub id, a file's name, or the generator's family.

    Where its rows were read from decides what it is, and where that isn't told, what lies under its path now.
    """
    path, generated = source.get("path"), source.get("generate")
    found = read.get(f"{path}:{source.get('split') or 'train'}") or read.get(str(path)) or {}
    hub = path is not None and ("hub" in found or not ("files" in found or looks_local(path)))
    name = f"generated: {generated.get('family', 'all')}" if generated else str(path)
    return {
        "name": name if hub or generated else Path(name).name,
        "hub": hub,
        "license": source.get("license"),
    }


def _evaluations(run: Path, points: list[str]) -> list[dict[str, Any]]:
    found = []
    for point in points:
        for path in sorted((run / "eval" / point).glob("*/metrics.json")):
            metrics = _json(path)
            if metrics:
                found.append({"point": point, **{key: metrics[key] for key in EVALUATION_KEYS if key in metrics}})
    return found


def _json(path: Path) -> dict[str, Any]:
    return read_sealed(path) or {}
