"""What a stage minimises: the loss of a token, what counts once in a step, and who can do that."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sft.train.collator import TEACHER_COLUMNS, WEIGHTS, Normalize
from sft.utils.errors import UserError

if TYPE_CHECKING:
    from sft.recipe.train_keys import TrainSection


@dataclass(frozen=True)
class Objective:
    """The loss of a stage's tokens.

    Attributes:
        options: those of `sambay_kernels.linear_cross_entropy`, where they aren't its defaults.
        normalize: what counts once.
        weights: whether rows have weights.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    normalize: Normalize = "token"
    weights: bool = False

    @classmethod
    def of(cls, train: TrainSection) -> Objective:
        """What the stage's `loss` says."""
        loss, teacher = train.loss, train.distill.options() if train.distill else {}
        return cls({**loss.options(), **teacher}, loss.normalize, loss.weights is not None)

    @property
    def weighted(self) -> bool:
        """Whether a step's losses are divided by the sum of their weights, not by their number."""
        return self.weights or self.normalize == "sample"

    @property
    def columns(self) -> list[str]:
        """What rows have to say of each token for it."""
        return [*([WEIGHTS] if self.weights else []), *(TEACHER_COLUMNS if "distill_weight" in self.options else [])]

    @property
    def plain(self) -> bool:
        """Whether this is the mean cross entropy of all supervised tokens, which any model's own loss is."""
        return not self.options and not self.weighted

    def arguments(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the model's forward is told of it beside the tokens of `batch`."""
        read = (WEIGHTS, *(TEACHER_COLUMNS if "distill_weight" in self.options else ()))
        beside = {name: batch[name] for name in read if batch.get(name) is not None}
        options = dict(self.options)
        if not beside.keys() >= set(TEACHER_COLUMNS):  # of a batch that trains nothing
            options.pop("distill_weight", None)
        return {**beside, **({"loss_options": options} if options else {})}


PLAIN_LOSS = Objective()


def refuse_own_loss(model: Any, objective: Objective, stage: str) -> None:
    """Raise UserError where the model's loss is its own, and the stage asks for another."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward = vars(base).get("forward")
    ours = hasattr(forward, "chunks_loss") or "loss_options" in inspect.signature(type(base).forward).parameters
    if not objective.plain and not ours:
        raise UserError(
            f"stages[{stage}].train.loss: {type(base).__name__} makes its loss in a way of its own (a scale, cap or "
            "bias of the logits, a loss of its experts, an adapted head), which no other can take the place of: leave "
            "`loss` out, which trains the model's own."
        )
