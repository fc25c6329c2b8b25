"""What a step may use: the tokenizer, the templates, the seed, a folder for what it must keep while it works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sft.data.read.outcomes import Dropped, Kept
from sft.data.read.record import Record, text_hash
from sft.data.read.row import BadRow
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
        workers: how many processes work on the step.
    """

    tokenizer_path: str
    templates: Templates
    seed: int
    folder: Path
    workers: int = 1

    def __reduce__(self) -> tuple[Any, ...]:
        return Context, (self.tokenizer_path, self.templates, self.seed, self.folder, self.workers)

    @cached_property
    def tokenizer(self) -> Any:
        """The fast tokenizer, as the stage's was saved: loading it this way spares each process the import of torch."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(self.tokenizer_path)

    @cached_property
    def _renderer(self) -> Any:
        from sft.data.tokenize.render import Renderer

        return Renderer(self.tokenizer)

    def measure(self, records: Sequence[Record]) -> list[Kept | Dropped]:
        """Set `tokens` and `trained` of each record as the chat template renders it; one outcome each, in order.

        Dropped are conversations that can't be rendered: a message spells a control token out, or the template
        refuses the roles. Call it whenever a step has changed or made conversations.
        """
        from sft.data.tokenize.tokens import tokenize

        outcomes: list[Kept | Dropped] = []
        rendered = []
        for record in records:
            result = self._renderer.render(record.messages) if record.messages is not None else None
            if isinstance(result, BadRow):
                outcomes.append(Dropped(record, result.reason, result.detail))
                continue
            outcomes.append(Kept(record))
            if result is not None:
                rendered.append((record, result))
        for (record, _), tokens in zip(rendered, tokenize(self.tokenizer, [item for _, item in rendered]), strict=True):
            record.tokens, record.trained = len(tokens.ids), tokens.supervised
        return outcomes

    def uniform(self, name: str, *what: str) -> float:
        """A number in [0, 1) that depends on the seed, on `name` (the purpose) and on `what` alone: the same in every
        process and in every order of the rows."""
        return text_hash("\0".join((str(self.seed), name, *what))) / (1 << 128)
