"""A run's export folder, and its push to the Hub."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.run.identity import done_manifest, trained_stages, untrained_stages
from sft.run.lock import lock
from sft.utils.errors import UserError
from sft.utils.files import check_writable, read_sealed, remove_file, sha256_json, unwritable, write_sealed

if TYPE_CHECKING:
    from sft.hub.push import PushResult
    from sft.recipe.paths import RunPaths

Say = Callable[[str], None]


def last_trained(paths: RunPaths) -> str:
    """The last stage that has been trained. Raises UserError when there is none."""
    trained = trained_stages(paths)
    if not trained:
        raise UserError(f"no stage of {paths.recipe.name} is trained in {paths.root}; run `sft run` first")
    return trained[-1]


def taken_stage(paths: RunPaths, stage: str | None, progress: Say | None = None) -> str:
    """`stage`, or the last one that is trained; of a run that isn't done a line says which, and what isn't trained.

    Raises UserError when it isn't trained.
    """
    if stage is not None:
        if done_manifest(paths, stage) is None:
            raise UserError(f"stage {stage} isn't trained in {paths.root}; run `sft run` or `sft train` first")
        return stage
    taken, missing = last_trained(paths), untrained_stages(paths)
    if missing and progress is not None:
        progress(f"the model after stage {taken} is taken; not trained yet: {', '.join(missing)}")
    return taken


def export_stage(
    paths: RunPaths,
    *,
    stage: str | None = None,
    out: Path | None = None,
    dtype: str | None = None,
    reuse: bool = False,
    progress: Say | None = None,
) -> Path:
    """Write the export folder of `stage`, or of the last stage trained. Raises UserError.

    With `reuse`, an export in the run's own folder that is whole and still of this model, recipe and results stays as
    it is, with whatever its model card has been edited to.
    """
    name = taken_stage(paths, stage, progress)
    done = done_manifest(paths, name)
    assert done is not None
    folder = out or paths.export
    wanted = _contents(paths, name, done, dtype or paths.recipe.model.dtype)
    seal = _seal(paths)
    if out is None and unwritable(paths.root):
        if reuse and _is(paths, wanted):
            return folder
        check_writable(paths.root, "`sft export --out DIR` writes to another folder")
    with _locked(paths, folder, progress):
        if reuse and out is None and _is(paths, wanted):
            return folder
        if out is None:
            remove_file(seal)
        from sft.hub.export import export

        export(
            paths.final_dir(name),
            folder,
            merge_lora=paths.recipe.push.merge_lora,
            dtype=wanted["dtype"],
            run_dir=paths.root,
            progress=progress,
        )
        if out is None:
            write_sealed(seal, wanted)
    return folder


def _locked(paths: RunPaths, folder: Path, progress: Say | None) -> AbstractContextManager[None]:
    """One export of a run at a time; one that can only be read keeps no lock, and a line says so."""
    if (why := unwritable(paths.root)) is None:
        return lock(paths.root / ".export.lock", f"{folder} is being written by another command: wait for it.")
    if progress is not None:
        progress(f"{paths.root}: no lock can be kept there ({why}); let no other command write to {folder}.")
    return nullcontext()


def export_is_current(paths: RunPaths) -> bool:
    """Whether the run's export is whole and of the last stage trained, with the recipe and results as they are now."""
    name = last_trained(paths)
    done = done_manifest(paths, name)
    return done is not None and _is(paths, _contents(paths, name, done, paths.recipe.model.dtype))


def _is(paths: RunPaths, wanted: dict[str, Any]) -> bool:
    return read_sealed(_seal(paths)) == wanted and _whole(paths.export)


def _seal(paths: RunPaths) -> Path:
    return paths.root / "export.json"


def _contents(paths: RunPaths, stage: str, done: dict[str, Any], dtype: str) -> dict[str, Any]:
    """What an export's content follows from."""
    from sft.hub.provenance import run_record

    return {
        "stage": stage,
        "key": done["key"],
        "files": done["files"],
        "dtype": dtype,
        "merge_lora": paths.recipe.push.merge_lora,
        "run": sha256_json(run_record(paths.root)),
    }


def _whole(folder: Path) -> bool:
    """Whether `folder` is an export and every file, but for a card edited by hand, is what was exported."""
    from sft.hub.folder import is_export, list_files

    try:
        return is_export(folder) and bool(list_files(folder))
    except UserError:
        return False


def push_obstacle(repo_id: str, *, publish: bool) -> str | None:
    """What would keep a push to `repo_id` from beginning, as far as it is known here or, of who would see it, within
    seconds from the Hub; None for nothing. `publish`: everybody may see it."""
    from sft.hub.push import check_destination, check_unseen
    from sft.utils.hub_ask import ASK_SECONDS, UnreachableError, answers

    try:
        check_destination(repo_id)
    except UserError as error:
        return str(error)
    if publish:
        return None
    (found,) = answers([("model", repo_id, lambda: check_unseen(repo_id, ASK_SECONDS))], ASK_SECONDS)
    return None if found is None or isinstance(found, UnreachableError) else str(found)


def check_push(paths: RunPaths, *, folder: Path | None = None, repo_id: str | None = None) -> None:
    """Raise UserError for what keeps a push from beginning and is known here, before anything is exported or sent."""
    from sft.hub.folder import read_manifest
    from sft.hub.push import check_destination

    if folder is None:
        last_trained(paths)
    else:
        read_manifest(folder)
    check_destination(repo_id or str(paths.recipe.push.repo_id))


def push_export(
    paths: RunPaths,
    *,
    folder: Path | None = None,
    repo_id: str | None = None,
    public: bool = False,
    revision: str | None = None,
    replace_card: bool = False,
    progress: Say | None = None,
) -> PushResult:
    """Push `folder` (default: the run's export). Raises UserError."""
    from sft.hub.push import push

    section = paths.recipe.push
    return push(
        folder or paths.export,
        repo_id or str(section.repo_id),
        private=section.private and not public,
        revision=revision,
        commit_message=section.commit_message,
        replace_card=replace_card,
        progress=progress,
    )
