"""What evaluations take: memory of the engine that answers, and how long it decodes, at most."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sft.run.plan import cards
from sft.run.plan.cards import Cluster
from sft.run.plan.shape import FLOAT32, Shape

if TYPE_CHECKING:
    from sft.recipe.schema import Stage, SuiteSection

PROBLEMS = {
    "HuggingFaceH4/MATH-500": 500,
    "HuggingFaceH4/aime_2024": 30,
    "yentinglin/aime_2025": 30,
    "Idavidrein/gpqa": 198,
    "openai/gsm8k": 1319,
}
"""Rows of well-known benchmarks' test splits."""
WIDTH, PAGE, BESIDE = 2, 64, 2
"""Bytes of a value on a GPU; tokens of a page, and slots beside the sequences' (sft.generate.states)."""


@dataclass(frozen=True)
class SuitePlan:
    """A suite at one point. `problems`, `tokens` (made by all ranks) and `hours` are None where nobody knows; both are
    at most: as if no answer ended by itself. `memory`: bytes of a rank."""

    name: str
    point: str
    times: int
    problems: int | None
    tokens: int | None
    hours: float | None
    memory: int


def slot_bytes(shape: Shape) -> int:
    """States and rings of a sequence, as `sft.generate.states.slot_bytes`."""
    mambas, windows = shape.memory_layer // 2 + 1, shape.memory_layer // 2
    scan = shape.inner * ((shape.mamba_d_conv - 1) * WIDTH + shape.mamba_d_state * FLOAT32)
    return mambas * scan + windows * 2 * shape.kv_width * shape.sliding_window * WIDTH


def page_bytes(shape: Shape) -> int:
    """Keys and values of a page's tokens: one layer's, which all that see everything read."""
    return 2 * shape.kv_width * PAGE * WIDTH


def engine_memory(shape: Shape, batch: int, longest: int) -> int:
    """Weights, slots and pages of a rank that decodes `batch` sequences of up to `longest` tokens."""
    weights = (shape.parameters - shape.always_float32) * WIDTH + shape.always_float32 * FLOAT32
    pages = batch * -(-longest // PAGE) * page_bytes(shape)
    logits = batch * shape.vocab_size * FLOAT32
    return weights + (batch + BESIDE) * slot_bytes(shape) + pages + logits


def step_seconds(shape: Shape, cluster: Cluster, batch: int, context: float) -> float:
    """Of one token for each of `batch` sequences that hold `context` tokens: all that is read, at measured shares."""
    assert cluster.card is not None
    weights = shape.parameters * WIDTH
    readers = shape.num_hidden_layers // 2 - shape.memory_layer // 2
    windowed = shape.memory_layer // 2 * 2 * shape.kv_width * min(shape.sliding_window, context) * WIDTH
    scan = 2 * (shape.memory_layer // 2 + 1) * shape.inner * shape.mamba_d_state * FLOAT32
    own = batch * (windowed + scan + readers * 2 * shape.kv_width * context * WIDTH)
    return (weights / cards.WEIGHT_SHARE + own / cards.PAGE_SHARE) / cluster.card.bandwidth


def suite_plans(number: int, stage: Stage, cluster: Cluster, shape: Shape, steps: int | None) -> list[SuitePlan]:
    """The suites of a stage: at the start, while it trains, and after it."""
    found = []
    points = ([("start", 1)] if number == 0 and stage.evaluate.before_first_stage else []) + [(stage.name, 1)]
    for point, times in points:
        found += [_suite(suite, point, times, cluster, shape) for suite in stage.evaluate.suites]
    every = stage.evaluate.every
    if every is not None and every.steps is not None and steps is not None:
        while_training = stage.evaluate.while_training()
        found += [_suite(suite, "while it trains", steps // every.steps, cluster, shape) for suite in while_training]
    return found


def _suite(suite: SuiteSection, point: str, times: int, cluster: Cluster, shape: Shape) -> SuitePlan:
    problems = problems_of(suite)
    longest = suite.max_length or suite.max_new_tokens
    memory = engine_memory(shape, suite.batch_size, longest)
    if problems is None:
        return SuitePlan(suite.name, point, times, None, None, None, memory)
    answers = problems * suite.samples_per_problem * times
    tokens = answers * suite.max_new_tokens
    if cluster.card is None:
        return SuitePlan(suite.name, point, times, problems, tokens, None, memory)
    own = -(-answers // cluster.count)
    batch = min(suite.batch_size, max(1, own))
    seconds = own / batch * suite.max_new_tokens * step_seconds(shape, cluster, batch, longest / 2)
    return SuitePlan(suite.name, point, times, problems, tokens, seconds / 3600, memory)


def problems_of(suite: SuiteSection) -> int | None:
    """How many a suite asks, where that can be told without its data."""
    source = suite.source
    known = PROBLEMS.get(source.path or "")
    if source.generate is not None:
        known = source.generate.rows
    elif source.path and source.path.endswith(".jsonl") and Path(source.path).is_file():
        with open(source.path, "rb") as lines:
            known = sum(1 for line in lines if line.strip())
    limits = [limit for limit in (suite.max_problems, source.max_rows, known) if limit is not None]
    return min(limits) if limits and (known is not None or suite.max_problems is not None) else None
