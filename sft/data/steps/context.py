"""What a step may use: the tokenizer, the templates, the seed, a folder for what it must keep while it works."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sft.data.read.record import Record, text_hash
from sft.recipe.schema import Templates

__all__ = ["Context", "Templates"]


@dataclass(frozen=True)
class Context:
    """What a step may use. It travels to worker processes, so it holds names and numbers, not open things.

    Attributes:
        tokenizer_path: folder of the saved tokenizer that the stage will train with.
        templates: of the section that the step stands in.
        seed: the recipe's.
        folder: the step's own folder, kept until the step is done: a killed step finds there what it had put there.
        journal: where what was paid for is kept, for every run that asks the same.
        workers: how many processes work on the step.
    """

    tokenizer_path: str
    templates: Templates
    seed: int
    folder: Path
    journal: Path
    workers: int = 1

    @property
    def tokenizer(self) -> Any:
        """The fast tokenizer, as the stage's was saved; one for all steps that a process works on."""
        return _loaded(self.tokenizer_path)

    def draw(self, name: str, record: Record, *what: str) -> float:
        """The same for a row: it depends on what the row says and on its source, not on its place or its id."""
        return self.uniform(name, record.source, record.problem or "", record.text, *what)

    def uniform(self, name: str, *what: str) -> float:
        """A number in [0, 1) that depends on the seed, on `name` (the purpose) and on `what` alone: the same in every
        process and in every order of the rows."""
        return text_hash("\0".join((str(self.seed), name, *what))) / (1 << 128)


@lru_cache(maxsize=1)
def _loaded(folder: str) -> Any:
    """The saved tokenizer. Loaded this way, it spares a process the import of torch."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)
