"""Settings of the step `render`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sft.recipe.problems import KeyProblem, raise_problems
from sft.recipe.steps.settings import StepSettings


class RenderStep(StepSettings):
    """Bring conversations into the form that is trained: thinking blocks, system messages, the user's instruction."""

    think: Literal["keep", "normalize", "strip"] = Field(
        default="normalize",
        description="`normalize` turns other marks of thinking into <think> ... </think>; `strip` takes it out.",
    )
    history_think: Literal["keep", "strip"] = Field(
        default="strip",
        description="Thinking in answers before the last user's message, which a served model doesn't see again.",
    )
    system: Literal["keep", "drop", "replace"] = Field(
        default="keep", description="System messages; `replace` puts system_prompt in every conversation."
    )
    system_prompt: str | None = Field(
        default=None, description="For `replace`; with `keep`, for conversations that have none."
    )
    prompt_template: str | None = Field(
        default=None, description="How the first user's message is written, e.g. '{prompt} Answer in \\boxed{}.'"
    )

    @model_validator(mode="after")
    def _check(self) -> RenderStep:
        problems = []
        if self.system == "replace" and not self.system_prompt:
            problems.append(KeyProblem(("system_prompt",), "is what `system: replace` puts in: give one", None))
        if self.system == "drop" and self.system_prompt:
            reason = "can't be used with `system: drop`; to put it in every conversation use `system: replace`"
            problems.append(KeyProblem(("system_prompt",), reason, self.system_prompt))
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            reason = "must contain {prompt}, the place where the user's text goes"
            problems.append(KeyProblem(("prompt_template",), reason, self.prompt_template))
        if problems:
            raise_problems("render", problems)
        return self
