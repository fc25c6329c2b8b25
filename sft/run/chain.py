"""The chain of stages: prepare, evaluate the start, then train and evaluate each stage; what is done is skipped."""

from __future__ import annotations

import fcntl
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.models.lora import lora_settings
from sft.recipe.paths import RunPaths
from sft.run.identity import done_manifest, previous_stage, stage_key, stage_parts, start_parts
from sft.train.checkpoints import describe_difference
from sft.train.handover import (
    default_dtype,
    load_final,
    load_stage_model,
    load_start,
    read_base,
    start_tokenizer,
)
from sft.train.stage import train_stage
from sft.utils.distributed import processes
from sft.utils.errors import UserError
from sft.utils.files import atomic_folder, read_json, sha256_json, write_json

if TYPE_CHECKING:
    from sft.recipe.schema import EvaluateSection, Recipe, Stage

__all__ = ["evaluate_point", "load_stage_model", "run", "train"]


@dataclass
class StartingPoint:
    """What a stage trains: a model (with adapters when it goes on training them), its tokenizer, its adapters' base."""

    model: Any
    tokenizer: Any
    base: dict[str, Any] | None


def run(
    recipe: Recipe, *, only_stage: str | None = None, restart: str | None = None, evaluate: bool = True
) -> dict[str, Any]:
    """Prepare, train and evaluate the recipe's stages in order; give the same call again to continue after a stop.

    `only_stage`: just this one (the stages before it must be done). `restart`: throw away what this stage and all later
    ones have made, and do them again. Returns {"stages": manifests by name, "evaluations": metrics by point}.
    Raises UserError when a stage is done or under way with another recipe: nothing is overwritten unasked.
    """
    layout = RunPaths(recipe)
    if only_stage:
        recipe.stage(only_stage)
    with _lock(layout):
        if restart:
            _throw_away(layout, restart)
        result: dict[str, Any] = {"stages": {}, "evaluations": {}}
        if evaluate and not only_stage and recipe.stages[0].evaluate.before_first_stage:
            result["evaluations"]["start"] = evaluate_point(layout, None)
        for stage in recipe.stages:
            if only_stage in (None, stage.name):
                result["stages"][stage.name] = _one_stage(layout, stage)
                if evaluate:
                    result["evaluations"][stage.name] = evaluate_point(layout, stage.name)
    return result


def train(recipe: Recipe, *, only_stage: str | None = None, restart: str | None = None) -> dict[str, Any]:
    """The same as run(), without evaluations."""
    return run(recipe, only_stage=only_stage, restart=restart, evaluate=False)


def _one_stage(layout: RunPaths, stage: Stage) -> dict[str, Any]:
    """Prepare and train one stage unless it is done."""
    from sft.data.prepare import prepare_stage

    recipe = layout.recipe
    # The stages hand the tokenizer on unchanged, so the rows of all are made with the one that the run starts with.
    tokenizer = start_tokenizer(layout)
    with processes().main_process_first():
        prepared = prepare_stage(recipe, stage, tokenizer, progress=_PrepareLines(stage.name))
    parts = stage_parts(layout, stage, prepared.manifest["key"])
    done = done_manifest(layout, stage.name)
    if done is not None:
        if done["key"] != stage_key(parts):
            raise UserError(
                f"Stage {stage.name} is done, but with other settings: {describe_difference(done['parts'], parts)}. "
                f"Put the recipe back, do it again with --restart {stage.name}, or choose another output_dir."
            )
        _say(f"{stage.name}: done already ({done['steps']} steps), skipped")
        return done
    point = _starting_point(layout, stage)
    return train_stage(
        recipe,
        stage,
        model=point.model,
        tokenizer=point.tokenizer,
        prepared=prepared,
        layout=layout,
        base=point.base,
    )


class _PrepareLines:
    """Progress of the preparation: a line every few seconds, and none when it is quick."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._last = time.monotonic()

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        if time.monotonic() - self._last >= 5:
            self._last = time.monotonic()
            _say(f"{self.stage}: {done:,}{f' of {total:,}' if total else ''} {phase} prepared")


def _starting_point(layout: RunPaths, stage: Stage) -> StartingPoint:
    """The model that `stage` goes on from.

    After a LoRA stage with the same LoRA settings the same adapter is trained on; otherwise it is merged first, and
    merged weights that get a new adapter are written to `stages/<name>/base`, so that the adapter's base stays.
    """
    before = previous_stage(layout, stage)
    settings = lora_settings(stage)
    dtype = "float32" if settings is None else default_dtype(layout)
    if before is None:
        model, tokenizer = load_start(layout, dtype=dtype)
        return StartingPoint(model, tokenizer, None)
    final = layout.final_dir(before.name)
    same = settings is not None and settings == lora_settings(before)
    model, tokenizer = load_final(layout, final, dtype=dtype, trainable=same)
    if not hasattr(model, "peft_config"):
        return StartingPoint(model, tokenizer, None)
    if same:
        base = {key: value for key, value in read_base(final).items() if key != "fingerprint"}
        return StartingPoint(model, tokenizer, base)
    model = model.merge_and_unload()
    if settings is None:
        return StartingPoint(model, tokenizer, None)
    return StartingPoint(*_written_base(layout, stage, model, tokenizer, dtype))


def _written_base(
    layout: RunPaths, stage: Stage, model: Any, tokenizer: Any, dtype: str
) -> tuple[Any, Any, dict[str, Any]]:
    from sft.models.load import load_checkpoint

    folder = layout.stage_dir(stage.name) / "base"
    with processes().main_process_first():
        if not folder.exists():
            with atomic_folder(folder) as path:
                model.save_pretrained(path)
    written = load_checkpoint(str(folder), dtype=dtype, trust_remote_code=layout.recipe.model.trust_remote_code)
    return written, tokenizer, {"kind": "folder", "path": str(folder.relative_to(layout.root))}


# ---- evaluation ----


def evaluate_point(layout: RunPaths, stage: str | None) -> dict[str, Any]:
    """Evaluate the model after `stage` (None: the start) on its suites, unless that is done with the same settings.

    Returns the metrics by suite; empty without suites.
    """
    owner = layout.recipe.stages[0] if stage is None else layout.recipe.stage(stage)
    section, point = owner.evaluate, stage or "start"
    if not section.suites:
        return {}
    marker = layout.eval_dir(point) / "manifest.json"
    key = _evaluation_key(layout, owner, section, stage)
    if marker.exists():
        done = read_json(marker)
        if done.get("key") == key:
            _say(f"{point}: evaluated already, skipped")
            return dict(done["metrics"])
    metrics: dict[str, Any] = {}
    if processes().is_main_process:
        metrics = _evaluate(layout, owner, stage, point)
        write_json(marker, {"key": key, "metrics": metrics})
    processes().wait_for_everyone()
    return metrics


def _evaluate(layout: RunPaths, owner: Stage, stage: str | None, point: str) -> dict[str, Any]:
    import gc

    import torch

    from sft.evaluate import evaluate

    model, tokenizer = load_stage_model(layout, stage)
    if torch.cuda.is_available():
        model.to("cuda")
    model.eval()
    metrics = evaluate(
        model,
        tokenizer,
        owner.evaluate,
        prompt_defaults=owner.data,
        out_dir=layout.eval_dir(point),
        point=point,
        model_key=sha256_json(_model_key(layout, stage)),
    )
    del model
    gc.collect()
    return dict(metrics)


def _evaluation_key(layout: RunPaths, owner: Stage, section: EvaluateSection, stage: str | None) -> str:
    """What an evaluation's numbers follow from: the model and the suites, with the prompts' templates."""
    return sha256_json(
        {
            "model": _model_key(layout, stage),
            "suites": section.model_dump(),
            "prompt_template": owner.data.prompt_template,
            "system_prompt": owner.data.system_prompt,
        }
    )


def _model_key(layout: RunPaths, stage: str | None) -> Any:
    """What the weights after `stage` (None: at the start) follow from."""
    if stage is not None:
        return (done_manifest(layout, stage) or {}).get("key")
    return start_parts(layout) | {"seed": layout.recipe.seed}


# ---- the run's folder ----


@contextmanager
def _lock(layout: RunPaths) -> Iterator[None]:
    """One run at a time in a folder; the lock goes with the process, however that ends."""
    layout.root.mkdir(parents=True, exist_ok=True)
    path: Path = layout.root / ".lock"
    with open(path, "w", encoding="utf-8") as handle:
        if processes().is_main_process:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(
                    f"Another run is at work in {layout.root}: wait for it, or set another output_dir."
                ) from error
        yield


def _throw_away(layout: RunPaths, name: str) -> None:
    """Remove what a stage and those after it have made. Asked for by name, never done otherwise."""
    layout.recipe.stage(name)
    names = [stage.name for stage in layout.recipe.stages]
    for stage in reversed(names[names.index(name) :]):
        if processes().is_main_process:
            # Without its manifest first: a kill in the middle must not leave a stage that looks done.
            layout.stage_manifest(stage).unlink(missing_ok=True)
            shutil.rmtree(layout.eval_dir(stage), ignore_errors=True)
            shutil.rmtree(layout.stage_dir(stage), ignore_errors=True)
    processes().wait_for_everyone()
    _say(f"threw away {', '.join(names[names.index(name) :])}")


def _say(text: str) -> None:
    if processes().is_main_process:
        print(text, file=sys.stderr, flush=True)
