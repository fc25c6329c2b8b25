"""What a run left behind about itself, gathered for the manifest and the model card; parts may be missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from sft.hub.hub_errors import scrub
from sft.utils.errors import UserError
from sft.utils.files import read_sealed, sha256_file, write_text

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
)


def run_record(run: Path | None) -> dict[str, Any] | None:
    """Recipe, stages, evaluations and environment of the run in folder `run`; None without a run.

    Home directories and anything that looks like a token are taken out of the text: the record is published.
    """
    if run is None:
        return None
    recipe = _recipe(run)
    names = [stage.get("name") for stage in recipe.get("stages") or [] if isinstance(stage, dict)]
    stages = [_stage(run, recipe, name) for name in names if name]
    environments = [stage.pop("environment", None) for stage in stages]
    record = {
        "name": recipe.get("name") or run.name,
        "description": recipe.get("description"),
        "seed": recipe.get("seed"),
        "start": {key: (recipe.get("model") or {}).get(key) for key in ("model_name_or_path", "tokenizer", "dtype")},
        "stages": stages,
        "evaluations": _evaluations(run, ["start", *[name for name in names if name]]),
        "environment": next((value for value in reversed(environments) if value), None),
    }
    return json.loads(_portable(json.dumps(record)))


def write_recipe(run: Path | None, folder: Path) -> None:
    """Put the run's resolved recipe beside the weights as recipe.yaml."""
    text = None if run is None else recorded_recipe(run)
    if text is not None:
        write_text(folder / "recipe.yaml", _portable(text))


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
        "world_size": manifest.get("world_size"),
        "counters": manifest.get("counters"),
        "data": {key: data[key] for key in DATA_KEYS if key in data},
        "sources": _sources(section.get("data") or {}),
        "environment": manifest.get("environment"),
    }


def _sources(section: dict[str, Any]) -> list[dict[str, Any]]:
    """The sources of a section, those of the data recipes that it names among them."""
    return [
        leaf
        for source in section.get("sources") or []
        for leaf in (_sources(source) if source.get("sources") else [_source(source)])
    ]


def _source(source: dict[str, Any]) -> dict[str, Any]:
    """A data source as the card names it: a Hub id, a file's name, or the generator's family."""
    path = source.get("path")
    generated = source.get("generate")
    local = path is not None and (Path(path).is_absolute() or path.startswith(".") or Path(path).suffix != "")
    name = f"generated: {generated.get('family', 'all')}" if generated else str(path)
    return {
        "name": Path(name).name if local else name,
        "hub": bool(path) and not local,
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


def _portable(text: str) -> str:
    """Text without this machine's home directory and without tokens."""
    home = str(Path.home())
    return scrub(text.replace(home + "/", "~/") if len(home) > 1 else text)
