"""Settings of the step `select`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sft.recipe.problems import KeyProblem, Section, raise_problems
from sft.recipe.steps.settings import Loc, StepSettings

Unit = Literal["rows", "tokens"]
STUDENT_VIEWS = ("rank_surprisal", "local_naturalness")
SCORES = ("teacher", "teacher_tokens", *STUDENT_VIEWS)
"""Preferences that the step `score` must have noted; it notes the student's views where it is asked to."""


class PassRate(Section):
    """Difficulty: the share of a problem's rollouts that are right."""

    of: Literal["rollouts", "verdicts", "column"] = Field(
        default="rollouts",
        description="Where it comes from: what explode_rollouts noted; the verdicts that verify left on the rows of "
        "the problem, where it kept right and wrong ones; a carried column.",
    )
    column: str | None = Field(default=None, description="For `column`: its name; no number ('n/a') is a missing rate.")
    min: float = Field(default=0.0, ge=0, le=1, description="Lowest rate that is taken.")
    max: float = Field(default=1.0, ge=0, le=1, description="Highest rate that is taken.")
    missing: Literal["keep", "drop"] = Field(default="drop", description="Rows without a rate.")
    verdicts: list[Literal["right", "wrong", "undecided"]] = Field(
        default=["right"], min_length=1, description="For `verdicts`: rows that go on once the rates are computed."
    )

    @model_validator(mode="after")
    def _check(self) -> PassRate:
        problems = []
        if (self.of == "column") != (self.column is not None):
            reason = "goes with `of: column`, and `of: column` with it"
            problems.append(KeyProblem(("column",), reason, self.column))
        if self.min > self.max:
            problems.append(KeyProblem(("max",), f"is {self.max}, less than min, which is {self.min}", self.max))
        if problems:
            raise_problems("pass_rate", problems)
        return self


class Quotas(Section):
    """Most rows or tokens of each domain or source: `{rows: {code: 1000}, tokens: {math: 5000000}}`."""

    by: Literal["domain", "source"] = Field(default="domain", description="What rows and tokens name.")
    rows: dict[str, int] = Field(default_factory=dict, description="Name -> most rows.")
    tokens: dict[str, int] = Field(default_factory=dict, description="Name -> most tokens.")
    others: Literal["keep", "drop"] = Field(default="keep", description="Rows of domains or sources not named here.")

    @model_validator(mode="after")
    def _check(self) -> Quotas:
        problems = [
            KeyProblem((unit, name), "can't be negative", limit)
            for unit, limits in (("rows", self.rows), ("tokens", self.tokens))
            for name, limit in limits.items()
            if limit < 0
        ]
        if not self.rows and not self.tokens:
            problems.append(KeyProblem((), "names no domain or source: give `rows` or `tokens`", None))
        if problems:
            raise_problems("quotas", problems)
        return self

    @property
    def names(self) -> set[str]:
        """Domains or sources with a quota."""
        return {*self.rows, *self.tokens}


class Lengths(Section):
    """Shares of length buckets: edges [4096, 16384] make three buckets, up to 4096, up to 16384 and beyond."""

    edges: list[int] = Field(min_length=1, description="Longest row of each bucket but the last, in tokens, ascending.")
    shares: list[float] = Field(description="Share of each bucket, one more than edges; normalised to a sum of 1.")
    of: Unit = Field(default="rows", description="What is shared out: rows or tokens.")

    @model_validator(mode="after")
    def _check(self) -> Lengths:
        problems = []
        if self.edges != sorted(set(self.edges)) or self.edges[0] < 1:
            problems.append(KeyProblem(("edges",), "must be positive and ascending", self.edges))
        if len(self.shares) != len(self.edges) + 1:
            reason = f"needs {len(self.edges) + 1} numbers, one more than edges, got {len(self.shares)}"
            problems.append(KeyProblem(("shares",), reason, self.shares))
        elif not all(0 <= share < float("inf") for share in self.shares) or not sum(self.shares):
            problems.append(KeyProblem(("shares",), "must be positive numbers or 0, not all 0", self.shares))
        if problems:
            raise_problems("lengths", problems)
        return self


class Diversity(Section):
    """Take rows from clusters of problems in turn, so that rare kinds of problems aren't outvoted."""

    clusters: int = Field(gt=1, le=4096, description="Number of k-means clusters over the words of the problems.")


class SelectStep(StepSettings):
    """Choose rows, in this order: by difficulty, by problem, by quota, by length, in all.

    Whatever limit a row competes for, rows go by `prefer`, then at random by the seed. Two `select` steps serve where
    two limits need two preferences: the shortest answers of each problem, then rows at random.
    """

    pass_rate: PassRate | None = Field(default=None, description=PassRate.__doc__)
    per_problem: int | None = Field(default=None, gt=0, description="At most this many answers of each problem.")
    prefer: list[
        Literal["shortest", "longest", "teacher", "teacher_tokens", "rank_surprisal", "local_naturalness", "random"]
    ] = Field(
        default=["random"],
        min_length=1,
        description="Which rows go first: `teacher` by the share of teacher sentences that `score` noted, "
        "`teacher_tokens` by that of their tokens, `rank_surprisal` the lowest, `local_naturalness` the highest. "
        "Rows without a score go last.",
    )
    quotas: Quotas | None = Field(default=None, description=Quotas.__doc__)
    lengths: Lengths | None = Field(default=None, description=Lengths.__doc__)
    diversity: Diversity | None = Field(default=None, description=Diversity.__doc__)
    rows: int | None = Field(default=None, gt=0, description="Most rows in all.")
    tokens: int | None = Field(default=None, gt=0, description="Most tokens in all, under the chat template.")

    @model_validator(mode="after")
    def _check(self) -> SelectStep:
        problems = []
        budget = any(value is not None for value in (self.quotas, self.lengths, self.rows, self.tokens))
        if not budget and self.per_problem is None and self.pass_rate is None:
            reason = "limits nothing: give pass_rate, per_problem, quotas, lengths, rows or tokens"
            problems.append(KeyProblem((), reason, None))
        elif self.changed("prefer") and not budget and self.per_problem is None:
            problems.append(KeyProblem(("prefer",), "has nothing to choose: no limit by rows or tokens", self.prefer))
        if self.diversity is not None and not budget:
            reason = "has nothing to choose: give quotas, lengths, rows or tokens"
            problems.append(KeyProblem(("diversity",), reason, None))
        if len(set(self.prefer)) < len(self.prefer) or "random" in self.prefer[:-1]:
            reason = "names each preference once, and `random` last: nothing is left to prefer after it"
            problems.append(KeyProblem(("prefer",), reason, self.prefer))
        problems += self._length_problems()
        if problems:
            raise_problems("select", problems)
        return self

    def _length_problems(self) -> list[KeyProblem]:
        if self.lengths is None:
            return []
        other: Unit = "tokens" if self.lengths.of == "rows" else "rows"
        value = self.tokens if other == "tokens" else self.rows
        if value is None:
            return []
        reason = f"would undo the shares of lengths, which are of {self.lengths.of}: set `lengths.of: {other}`"
        return [KeyProblem((other,), reason, value)]

    def needs_answers(self) -> bool:
        """Rows without one have no length."""
        by_tokens = self.tokens is not None or self.lengths is not None or (self.quotas and self.quotas.tokens)
        return bool(by_tokens or {"shortest", "longest"} & set(self.prefer))

    def columns(self) -> dict[Loc, str]:
        """The column with the pass rate."""
        column = self.pass_rate.column if self.pass_rate is not None else None
        return {} if column is None else {("pass_rate", "column"): column}

    def sources(self) -> dict[Loc, str]:
        """Those with a quota."""
        quotas = self.quotas if self.quotas is not None and self.quotas.by == "source" else None
        units = {"rows": quotas.rows, "tokens": quotas.tokens} if quotas is not None else {}
        return {("quotas", unit, name): name for unit, limits in units.items() for name in limits}

    def behind(self) -> dict[Loc, tuple[str, ...]]:
        """What notes the pass rates and the scores."""
        found: dict[Loc, tuple[str, ...]] = {
            ("prefer", index): (f"score.{key}" if key in STUDENT_VIEWS else "score",)
            for index, key in enumerate(self.prefer)
            if key in SCORES
        }
        rate = {"rollouts": "explode_rollouts", "verdicts": "verify"}.get(self.pass_rate.of if self.pass_rate else "")
        return {**found, ("pass_rate",): (rate,)} if rate else found
