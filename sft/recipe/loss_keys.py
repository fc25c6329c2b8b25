"""The keys of a stage's `train.loss` and `train.distill`: what its tokens are trained to minimise."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from sft.recipe.problems import KeyProblem, Section, raise_problems

PARAMETERS = {"power": "alpha", "threshold": "threshold"}
"""Type -> the key that it needs, and no other type has."""


class LossSection(Section):
    """The loss of a supervised token, as `sambay_kernels.linear_cross_entropy` defines it, and how tokens are averaged.

    The loss of held-out rows and the scores of evaluations stay the plain cross entropy, whatever this says.
    """

    type: Literal["nll", "dft", "power", "threshold"] = Field(
        default="nll",
        description="With p the token's probability: -log p (nll), -sg(p) log p (dft, arXiv 2508.05629), "
        "(1 - p^alpha) / alpha (power, arXiv 2510.00526), -log p where p >= threshold (threshold, the same paper).",
    )
    alpha: float | None = Field(
        default=None, ge=1e-6, description="Of power: 1 has dft's gradient, towards 0 it is nll."
    )
    threshold: float | None = Field(
        default=None,
        ge=1e-6,
        le=1 - 1e-6,
        description="Of threshold: tokens that the model gives less than this say nothing.",
    )
    normalize: Literal["token", "sample"] = Field(
        default="token", description="What counts once in a step: each supervised token, or each document (sample)."
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, le=1, description="Share of the loss that asks for every token of the vocabulary alike."
    )
    z_loss: float = Field(
        default=0.0, ge=0, description="Weight of the squared log-sum-exp of the logits, such as 1e-4."
    )
    weights: str | None = Field(
        default=None,
        min_length=1,
        description="Column of the data with weights from 0 up: a number for a row, or a list of them for its messages "
        "or its tokens. A step's loss is divided by their sum.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        for kind, key in PARAMETERS.items():
            value = getattr(self, key)
            if self.type == kind and value is None:
                problems.append(KeyProblem((key,), f"is needed with `type: {kind}`", None))
            if self.type != kind and value is not None:
                problems.append(KeyProblem((key,), f"has no effect without `type: {kind}`", value))
        if problems:
            raise_problems("loss", problems)
        return self

    def changes_loss(self) -> bool:
        """Whether it asks for anything else than the mean cross entropy of all supervised tokens."""
        return any(self.changed(key) for key in type(self).model_fields)

    def options(self) -> dict[str, Any]:
        """Those of `linear_cross_entropy` that aren't its defaults."""
        told: dict[str, Any] = {"loss_type": self.type, "alpha": self.alpha, "threshold": self.threshold}
        told |= {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss}
        return {name: value for name, value in told.items() if value not in ("nll", None, 0.0)}


class DistillSection(Section):
    """A teacher's best tokens to learn from, beside the labels, at the tokens whose rows say them."""

    weight: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="w in (1 - w) * loss + w * divergence; a token without a teacher has w = 0.",
    )
    divergence: Literal["forward", "reverse", "skewed"] = Field(
        default="forward",
        description="KL(p || q), KL(q || p) or KL(p || a p + (1 - a) q), as in DistiLLM; p the teacher's, q the "
        "student's.",
    )
    alpha: float | None = Field(default=None, ge=0, le=1 - 1e-6, description="a of skewed. Default: 0.1.")
    tail: Literal["bucket", "renormalize"] = Field(
        default="bucket",
        description="All tokens that the teacher doesn't name are one more outcome (bucket), or are left out.",
    )
    temperature: float = Field(
        default=1.0,
        ge=1e-6,
        description="t: each side's outcomes become proportional to p^(1/t), the bucket among them.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.alpha is not None and self.divergence != "skewed":
            problem = KeyProblem(("alpha",), "has no effect without `divergence: skewed`", self.alpha)
            raise_problems("distill", [problem])
        return self

    def options(self) -> dict[str, Any]:
        """Those of `linear_cross_entropy`."""
        told: dict[str, Any] = {"distill_weight": self.weight, "divergence": self.divergence, "tail": self.tail}
        return {**told, "temperature": self.temperature, "skew": 0.1 if self.alpha is None else self.alpha}
