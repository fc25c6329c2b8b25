"""`--restart`: what a stage and the later ones have made is thrown away, once; the same command then goes on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sft.recipe.paths import RunPaths
from sft.utils.distributed import decide, is_main
from sft.utils.errors import RestartError
from sft.utils.files import read_sealed, remove_file, sha256_json, write_sealed
from sft.utils.say import say


def is_under_way(paths: RunPaths, stage: str) -> bool:
    """Whether the same command, with `--restart STAGE`, has thrown away what there was, and was stopped since."""
    return read_sealed(paths.restart) == _asked(paths, stage)


@contextmanager
def begun_anew(paths: RunPaths, stage: str | None) -> Iterator[None]:
    """What `stage` and the later ones have made is gone, unless it was made since the same was asked for; on all
    processes, in front of the work. An error that asks for `--restart` means what was made since, too."""
    if stage is not None and decide(lambda: is_under_way(paths, stage)):
        say(f"{stage}: begun anew before, by the same command with --restart; goes on")
    elif stage is not None:
        decide(lambda: _throw_away(paths, stage))
    try:
        yield
    except RestartError:
        is_over(paths)
        raise


def is_over(paths: RunPaths) -> None:
    """All that a command with `--restart` was to do is done: the same command begins anew. By the main process."""
    if is_main():
        remove_file(paths.restart)


def _asked(paths: RunPaths, stage: str) -> dict[str, str]:
    return {"stage": stage, "recipe": sha256_json(paths.recipe.model_dump(mode="json"))}


def _throw_away(paths: RunPaths, stage: str) -> None:
    """Remove what a stage and those after it have made. Asked for by name, never done otherwise."""
    names = [found.name for found in paths.recipe.stages]
    later = names[names.index(stage) :]
    remove_file(paths.restart)
    for name in reversed(later):
        # Without its manifest first: a kill in the middle must not leave a stage that looks done.
        remove_file(paths.stage_manifest(name))
        _remove(paths.eval_dir(name))
        _remove(paths.stage_dir(name))
    # Last: after a kill before it the same command throws away what is left.
    write_sealed(paths.restart, _asked(paths, stage))
    say(f"threw away {', '.join(later)}")


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
