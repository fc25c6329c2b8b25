"""How the rows of an optimizer step are shared out: they stay as many as a stage began with, on however many processes.

The recipe's `per_device_train_batch_size` and `gradient_accumulation_steps`, and the processes there are at a stage's
first step, say how many rows a step has. Started again on other processes the stage goes on with as many.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sft.train.checkpoints import MARKER, checkpoint_folders
from sft.utils.errors import RestartError
from sft.utils.files import read_sealed, sha256_json, write_sealed
from sft.utils.say import say
from sft.utils.tables import counted

if TYPE_CHECKING:
    from sft.recipe.schema import Stage

BEGUN = "begun.json"
"""In a stage's folder: of what training, and with how many rows a step, it was begun."""


class Share(NamedTuple):
    """What a process does of an optimizer step: so many micro-batches of so many rows."""

    rows: int
    micro_batches: int


def asked_share(stage: Stage) -> Share:
    """The share that the recipe asks for."""
    return Share(stage.train.per_device_train_batch_size, stage.train.gradient_accumulation_steps)


def share_of(stage: Stage, folder: Path, trained: dict[str, Any], processes: int, *, resume: bool) -> Share:
    """The share of each of `processes` in a step of `stage`, whose checkpoints are in `folder`.

    `trained`: what the weights follow from; where it is another training that was begun there, where the recipe asks
    for another share than when it was, or without `resume`, the recipe alone says it.
    Raises UserError when the rows of a step can't be shared out evenly.
    """
    asked = asked_share(stage)
    begun = _begun(folder, trained, asked.rows * asked.micro_batches) if resume else None
    if begun is None or begun == asked.rows * asked.micro_batches * processes:
        return asked
    if begun % processes:
        raise RestartError(
            f"Stage {stage.name} was begun with {counted(begun, 'row')} an optimizer step, which {processes} processes "
            f"can't share evenly: start as many as divide {begun}, or start the stage again with --restart "
            f"{stage.name}."
        )
    share = begun // processes
    rows = next(rows for rows in range(min(asked.rows, share), 0, -1) if share % rows == 0)
    say(
        f"{stage.name}: goes on with {counted(begun, 'row')} an optimizer step, as it was begun: "
        f"{counted(share // rows, 'micro-batch', 'micro-batches')} of {rows} on each of {processes}"
    )
    return Share(rows, share // rows)


def note_begun(folder: Path, trained: dict[str, Any], asked: Share, rows: int) -> None:
    """Write down that the training `trained` is begun in `folder`, where the recipe asks for a share and a step has
    so many rows."""
    note = {"trained": sha256_json(trained), "asked": asked.rows * asked.micro_batches, "rows": rows}
    write_sealed(folder / BEGUN, note)


def _begun(folder: Path, trained: dict[str, Any], asked: int) -> int | None:
    """The rows of a step with which a training was begun, by its newest checkpoint or before it had one; None where
    the recipe asks for another share now."""
    for _, checkpoint in reversed(checkpoint_folders(folder)):
        if marker := read_sealed(checkpoint / MARKER):
            same = marker.get("ran_on", {}).get("asked") == asked
            return int(marker["identity"]["rows_of_a_step"]) if same else None
    note = read_sealed(folder / BEGUN) or {}
    same = note.get("trained") == sha256_json(trained) and note.get("asked") == asked
    return int(note["rows"]) if same else None
