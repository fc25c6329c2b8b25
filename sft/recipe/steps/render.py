"""Settings of the step `render`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sft.recipe.problems import Section


class RenderStep(Section):
    """Bring conversations into the form that is trained: thinking blocks, system messages."""

    think: Literal["keep", "normalize", "strip"] = Field(
        default="normalize",
        description="`normalize` turns other marks of thinking into <think> ... </think>; `strip` takes it out.",
    )
    history_think: Literal["keep", "strip"] = Field(
        default="strip", description="Thinking in earlier assistant turns, which a served model doesn't see again."
    )
    system: Literal["keep", "drop", "replace"] = Field(
        default="keep", description="System messages; `replace` puts system_prompt in every conversation."
    )
    system_prompt: str | None = Field(default=None, description="For `replace`, and for rows that have none.")
