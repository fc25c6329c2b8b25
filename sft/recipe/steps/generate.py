"""Settings of the step `generate`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sft.recipe.problems import Section


class Endpoint(Section):
    """An OpenAI-compatible server."""

    base_url: str = Field(description="e.g. http://localhost:8000/v1")
    model: str
    api_key_env: str = Field(
        default="OPENAI_API_KEY", description="Environment variable that holds the key, if it needs one."
    )
    concurrency: int = Field(default=32, gt=0)
    timeout: float = Field(default=600.0, gt=0, description="Seconds one answer may take.")
    max_retries: int = Field(default=8, ge=0)
    input_price: float = Field(default=0.0, ge=0, description="Per million tokens, for the count of the cost.")
    output_price: float = Field(default=0.0, ge=0)


class GenerateStep(Section):
    """Ask a teacher for answers, or let it finish the student's (mixed policy, arXiv 2601.09088)."""

    mode: Literal["rollouts", "mixed"] = "rollouts"
    teacher: Endpoint
    student: Endpoint | None = Field(default=None, description="For `mixed`: who answers first.")
    n: int = Field(default=1, gt=0, description="Answers for each problem.")
    temperature: float = Field(default=0.6, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    max_tokens: int = Field(default=32768, gt=0)
    logprobs: bool = Field(default=False, description="Keep the log probabilities, where the server gives them.")
