"""Rows of generated problems, train and test disjoint by construction."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any

from sft.data.read.generated import arithmetic, equations, stories
from sft.data.read.generated.chains import MAX_STEPS, MOST_SHORT_STEPS
from sft.data.read.generated.problem import Problem
from sft.recipe.schema import GenerateSource
from sft.utils.errors import UserError

_TEST_SHARE = 10
_PATIENCE = 1000
_SCALING = 0.32
"""Chance of a step to multiply or divide, unless a source names another."""
_DRAW: dict[str, Callable[[random.Random, int, float], Problem]] = {
    "arithmetic": arithmetic.draw,
    "equations": equations.draw,
    "words": stories.draw,
}


def split_of(problem: Problem) -> str:
    """`test` for a tenth of all problems, `train` for the others: decided by a hash of the calculations alone.

    So no calculation asked in a test problem was ever seen in training, not even in other words or with other names.
    """
    digest = hashlib.blake2b(problem.canonical.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % _TEST_SHARE == 0 else "train"


def completion_of(problem: Problem) -> str:
    """The worked reasoning inside <think> tags, then the boxed answer."""
    return f"<think>\n{problem.solution}\n</think>\n\\boxed{{{problem.answer}}}"


def _draw_new(rng: random.Random, family: str, source: GenerateSource, seen: set[str]) -> Problem:
    scaling = _SCALING if source.scaling is None else source.scaling
    for _ in range(_PATIENCE):
        # Drawn anew each time: rounds can't make every number of steps (13 is no product).
        problem = _DRAW[family](rng, rng.randint(source.min_steps, source.max_steps), scaling)
        if split_of(problem) == source.split and problem.canonical not in seen and problem.steps >= source.min_steps:
            seen.add(problem.canonical)
            return problem
    raise UserError(
        f"generate: no new {source.split} problem of family {family!r} with {source.min_steps} to {source.max_steps} "
        f"steps in {_PATIENCE} draws; ask for fewer rows or another number of steps"
    )


def generate_rows(source: GenerateSource) -> Iterator[dict[str, Any]]:
    """The rows that `source` asks for: id, prompt, completion, answer (text), family, steps.

    The same source always gives the same rows, in the same order, and no problem twice. Family `all` takes the three
    families in turn. The number of steps is about uniform over `min_steps..max_steps`; problems of more than 8 steps
    are told as rounds of a few calculations, so that the question stays short and the solution gets long.

    Raises:
        UserError: for problems with more than MAX_STEPS steps, for `scaling` where no step multiplies, or when there
            are no more new problems.
    """
    if source.max_steps > MAX_STEPS:
        raise UserError(f"generate: max_steps {source.max_steps} is too many; at most {MAX_STEPS}")
    if source.scaling is not None and source.max_steps > MOST_SHORT_STEPS:
        raise UserError(
            f"generate: scaling {source.scaling} is for problems of at most {MOST_SHORT_STEPS} steps, and max_steps is "
            f"{source.max_steps}; longer ones only add and subtract: leave it out there"
        )
    families = list(_DRAW) if source.family == "all" else [source.family]
    # Seeding with text hashes it with SHA-512: the same everywhere, and unlike for seeds that differ by one.
    rng = random.Random(f"{source.seed}/{source.split}/{source.family}/{source.min_steps}-{source.max_steps}")
    seen: set[str] = set()
    for index in range(source.rows):
        family = families[index % len(families)]
        problem = _draw_new(rng, family, source, seen)
        yield {
            "id": f"{family}-{source.split}-{source.seed}-{source.min_steps}-{source.max_steps}-{index}",
            "prompt": problem.prompt,
            "completion": completion_of(problem),
            "answer": str(problem.answer),
            "family": family,
            "steps": problem.steps,
        }
