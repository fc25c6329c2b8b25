"""What a data recipe may say about its steps: an entry of `steps` is the name of one step and its settings."""

from __future__ import annotations

from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from sft.recipe.problems import KeyProblem, Section, nearest, raise_problems
from sft.recipe.steps.decontaminate import DecontaminateStep
from sft.recipe.steps.dedup import DedupStep
from sft.recipe.steps.explode_rollouts import ExplodeRolloutsStep
from sft.recipe.steps.filter import FilterStep
from sft.recipe.steps.generate import GenerateStep
from sft.recipe.steps.join import JoinStep
from sft.recipe.steps.length import LengthStep
from sft.recipe.steps.mix import MixStep
from sft.recipe.steps.quality import QualityStep
from sft.recipe.steps.render import RenderStep
from sft.recipe.steps.score import ScoreStep
from sft.recipe.steps.select import SelectStep
from sft.recipe.steps.settings import StepSettings
from sft.recipe.steps.top_logprobs import TopLogprobsStep
from sft.recipe.steps.verify import VerifyStep

__all__ = ["StepEntry"]


class StepEntry(Section):
    """One step: `- length: {max_tokens: 16384}`, or `- quality` where the defaults will do."""

    render: RenderStep | None = Field(default=None, description=RenderStep.__doc__)
    explode_rollouts: ExplodeRolloutsStep | None = Field(default=None, description=ExplodeRolloutsStep.__doc__)
    filter: FilterStep | None = Field(default=None, description=FilterStep.__doc__)
    length: LengthStep | None = Field(default=None, description=LengthStep.__doc__)
    verify: VerifyStep | None = Field(default=None, description=VerifyStep.__doc__)
    quality: QualityStep | None = Field(default=None, description=QualityStep.__doc__)
    dedup: DedupStep | None = Field(default=None, description=DedupStep.__doc__)
    decontaminate: DecontaminateStep | None = Field(default=None, description=DecontaminateStep.__doc__)
    select: SelectStep | None = Field(default=None, description=SelectStep.__doc__)
    mix: MixStep | None = Field(default=None, description=MixStep.__doc__)
    join: JoinStep | None = Field(default=None, description=JoinStep.__doc__)
    score: ScoreStep | None = Field(default=None, description=ScoreStep.__doc__)
    top_logprobs: TopLogprobsStep | None = Field(default=None, description=TopLogprobsStep.__doc__)
    generate: GenerateStep | None = Field(default=None, description=GenerateStep.__doc__)

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in cls.model_fields:
                reason = f"no step {value!r}{nearest(value, cls.model_fields) or _known(cls)}"
                raise_problems("step", [KeyProblem((), reason, value)])
            return {value: {}}
        if isinstance(value, dict):
            return {name: {} if settings is None else settings for name, settings in value.items()}
        return value

    @model_validator(mode="after")
    def _one_step(self) -> StepEntry:
        if len(self.model_fields_set) != 1:
            given = ", ".join(sorted(self.model_fields_set)) or "nothing"
            reason = f"an entry of `steps` is one step and its settings, got {given}"
            raise_problems("step", [KeyProblem((), reason, None)])
        return self

    @model_serializer(mode="wrap")
    def _its_step(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: settings for name, settings in handler(self).items() if settings is not None}

    @property
    def name(self) -> str:
        """The step's name."""
        return next(iter(self.model_fields_set))

    @property
    def config(self) -> StepSettings:
        """The step's settings."""
        settings: StepSettings = getattr(self, self.name)
        return settings


def _known(entry: type[StepEntry]) -> str:
    return f"; steps: {', '.join(entry.model_fields)}"
