"""Settings of the step `generate`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sft.recipe.problems import KeyProblem, Section, raise_problems
from sft.recipe.steps.settings import DataSet, Loc, StepSettings
from sft.recipe.values import PathText

# These change no answer: how fast and how patiently it is asked for, what it costs, and where the model is.
_RUN_ONLY = {
    *("base_url", "api_key_env", "concurrency", "timeout", "max_retries", "retry_delay"),
    *("input_price", "output_price"),
}

# What the step itself puts into a request; extra_body is for everything else.
_OWN_KEYS = {
    *("model", "messages", "prompt", "n", "stream", "temperature", "top_p", "max_tokens", "max_completion_tokens"),
    *("seed", "logprobs", "top_logprobs", "continue_final_message", "add_generation_prompt"),
}


class Endpoint(Section):
    """An OpenAI-compatible server."""

    base_url: str = Field(description="e.g. http://localhost:8000/v1")
    model: str = Field(description="What the server calls the model.")
    api_key_env: str = Field(
        default="OPENAI_API_KEY", description="Environment variable that holds the key, if it needs one."
    )
    concurrency: int = Field(default=32, gt=0, le=1000, description="Requests on their way at once.")
    timeout: float = Field(
        default=3600.0, gt=0, description="Seconds until a whole answer must be there (they aren't streamed)."
    )
    max_retries: int = Field(
        default=10, ge=0, description="After 408, 409, 429, 5xx, timeouts, broken connections and broken answers."
    )
    retry_delay: float = Field(
        default=1.0, gt=0, description="Seconds before the first retry; each next one waits twice as long, up to 60 s."
    )
    send_seed: bool = Field(default=True, description="Whether requests carry `seed`; some servers refuse it.")
    max_tokens_key: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens", description="What the server calls the limit of an answer in a chat request."
    )
    extra_body: dict[str, Any] = Field(
        default_factory=dict, description="Further keys of each request: top_k, reasoning_effort, chat_template_kwargs."
    )
    input_price: float = Field(default=0.0, ge=0, description="Per million tokens, for the count of the cost.")
    output_price: float = Field(default=0.0, ge=0, description="Per million tokens, reasoning included.")
    tokenizer: PathText | None = Field(
        default=None,
        description="For `continuation: completions`: folder or Hub id of the tokenizer whose chat template renders "
        "the prompt. Default: that of the model that is trained.",
    )
    marks: dict[str, str] = Field(
        default_factory=dict,
        description="For `continuation: completions`: our spelling -> the teacher's, of marks such as <think>.",
    )

    @model_validator(mode="after")
    def _check(self) -> Endpoint:
        if not self.base_url.startswith(("http://", "https://")):
            reason = f"must begin with http:// or https://, got {self.base_url!r}"
            raise_problems("endpoint", [KeyProblem(("base_url",), reason, self.base_url)])
        if taken := sorted(_OWN_KEYS & self.extra_body.keys()):
            reason = f"{taken[0]!r} is set by the step itself, from its own keys"
            raise_problems("endpoint", [KeyProblem(("extra_body", taken[0]), reason, self.extra_body[taken[0]])])
        if "" in self.marks or "" in self.marks.values():
            raise_problems("endpoint", [KeyProblem(("marks",), "can't spell anything as nothing", None)])
        return self


class Checkpoint(Section):
    """A student that answers in this process."""

    checkpoint: PathText = Field(description="Checkpoint folder or Hub id, with its tokenizer.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a Hub checkpoint.")
    dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="What the weights are held in.")
    batch_size: int = Field(default=32, gt=0, description="Answers that are decoded at once.")


class GenerateStep(StepSettings):
    """Ask a teacher for answers, or let it finish the student's (mixed policy, arXiv 2601.09088)."""

    gives_answers = True

    mode: Literal["rollouts", "mixed"] = Field(
        default="rollouts", description="`rollouts`: the teacher answers; `mixed`: it finishes what the student began."
    )
    teacher: Endpoint
    student: Endpoint | Checkpoint | None = Field(
        default=None, description="For `mixed`: who answers first, an endpoint or {checkpoint: FOLDER}."
    )
    n: int = Field(default=1, gt=0, description="Answers for each problem.")
    temperature: float | None = Field(default=0.6, ge=0, description="null: not sent, the server's own.")
    top_p: float | None = Field(default=0.95, gt=0, le=1, description="null: not sent, the server's own.")
    max_tokens: int = Field(default=32768, gt=0, description="Most tokens of one answer, or of one continuation.")
    truncated: Literal["drop", "keep"] = Field(default="drop", description="Answers that were cut off at max_tokens.")
    max_failed: float = Field(
        default=0.05, ge=0, le=1, description="Share of requests that may fail for good; more stop the run."
    )
    logprobs: bool = Field(
        default=False, description="For `rollouts`: keep the tokens' log probabilities, where the server gives them."
    )
    top_logprobs: int | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="For `rollouts`: keep this many of the teacher's likeliest tokens at each token, to learn from, "
        "where the server gives them (OpenAI's at most 20).",
    )
    cap: float = Field(
        default=1.5, gt=0, description="For `mixed`: most tokens of the student's answer, over those of the row's own."
    )
    continuation: Literal["completions", "chat"] = Field(
        default="completions",
        description="For `mixed`: how the teacher goes on with a text: /completions with the rendered prompt, or "
        "/chat/completions with continue_final_message, which vLLM and SGLang know.",
    )

    @field_validator("student", mode="before")
    @classmethod
    def _which_student(cls, value: Any) -> Any:
        # By its key, so that a mistake is told once, and not for each of the two.
        if isinstance(value, dict):
            return (Checkpoint if "checkpoint" in value else Endpoint).model_validate(value)
        return value

    @model_validator(mode="after")
    def _check(self) -> GenerateStep:
        problems = []
        if self.mode == "mixed" and self.student is None:
            problems.append(KeyProblem(("student",), "mode `mixed` needs a student: who answers first", None))
        if self.mode == "rollouts" and self.student is not None:
            problems.append(KeyProblem(("student",), "only mode `mixed` asks a student", None))
        for key in ("logprobs", "top_logprobs"):
            if self.mode == "mixed" and getattr(self, key):
                reason = "only mode `rollouts` keeps them: of a mixed answer the teacher wrote a part alone"
                problems.append(KeyProblem((key,), reason, getattr(self, key)))
        if isinstance(self.student, Checkpoint) and None in (self.temperature, self.top_p):
            key = "temperature" if self.temperature is None else "top_p"
            problems.append(KeyProblem((key,), "a student that is a checkpoint needs a number here", None))
        if self.teacher.marks and (self.mode, self.continuation) != ("mixed", "completions"):
            reason = "is for mode `mixed` with `continuation: completions`; elsewhere the server spells the marks"
            problems.append(KeyProblem(("teacher", "marks"), reason, None))
        if problems:
            raise_problems("generate", problems)
        return self

    def deciding(self) -> dict[str, Any]:
        """The settings that decide what is answered, without those that say how fast, how patiently and from where.

        Of a checkpoint and a tokenizer the content decides (`Generate.identity`), not where it lies.
        """
        teacher, student = {*_RUN_ONLY, "tokenizer"}, {*_RUN_ONLY, "batch_size", "checkpoint"}
        run_only: dict[str, Any] = {"max_failed": True, "teacher": teacher, "student": student}
        if self.top_logprobs is None:
            run_only["top_logprobs"] = True  # what isn't asked for is no setting: older answers are answers to this
        return self.model_dump(mode="json", exclude=run_only)

    def notes(self) -> tuple[str, ...]:
        """The teacher's likeliest tokens."""
        return ("generate.top_logprobs",) if self.top_logprobs is not None else ()

    def places(self) -> dict[Loc, DataSet | str]:
        """The student's checkpoint and the teacher's tokenizer."""
        found: dict[Loc, DataSet | str] = {}
        if isinstance(self.student, Checkpoint):
            found["student", "checkpoint"] = self.student.checkpoint
        if self.teacher.tokenizer is not None:
            found["teacher", "tokenizer"] = self.teacher.tokenizer
        return found
