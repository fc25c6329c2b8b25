"""`sft plan`: what a run will take, before anything is loaded: memory of a rank, time, disk, and what to change."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sft.cli.common import CONFIG_HELP, console, positive, recipe_of
from sft.run.plan.rows import DOCUMENT
from sft.utils.tables import counted

if TYPE_CHECKING:
    from sft.run.plan.cards import Cluster
    from sft.run.plan.stages import StagePlan

TAKES_OVERRIDES = True
GIB, GB = 1 << 30, 1e9
GPUS = "8xA100-80"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe, and the cards to plan for."""
    parser.set_defaults(prog=parser.prog)
    parser.add_argument("--config", metavar="RECIPE", help=CONFIG_HELP)
    parser.add_argument("--stage", metavar="NAME", help="this stage alone")
    parser.add_argument(
        "--gpus", metavar="NxCARD", help=f"such as {GPUS}, 32xH100-80, H200-141, or cpu (default: {GPUS})"
    )
    text = "tokens of an epoch of stages whose rows aren't prepared (default: their time isn't told)"
    parser.add_argument("--epoch_tokens", type=positive, metavar="N", help=text)
    text = f"tokens of a document of packed rows that aren't prepared (default: {DOCUMENT:,})"
    parser.add_argument("--document_tokens", type=positive, metavar="N", default=DOCUMENT, help=text)


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print the plan. Exit status 0, whether it fits or not."""
    from sft.run.plan.cards import cluster_of
    from sft.run.plan.rows import Told
    from sft.run.plan.stages import plan_recipe

    cluster = cluster_of(arguments.gpus or GPUS)
    recipe = recipe_of(arguments, overrides)
    plans = plan_recipe(recipe, cluster, arguments.stage, Told(arguments.epoch_tokens, arguments.document_tokens))
    arguments.told.update(recipe=recipe.name, gpus=str(cluster), stages=list(map(_as_json, plans)))
    _show(recipe.name, cluster, plans)
    return 0


def _as_json(plan: StagePlan) -> dict[str, Any]:
    told = asdict(plan)
    for choice in [told, *(told[name] for name in ("smallest", "fastest") if told[name])]:
        adapters = choice["layout"].get("adapters")
        if adapters:
            adapters["targets"] = sorted(adapters["targets"])
    totals = {"memory_total": plan.memory.total, "tokens_of_a_step": plan.tokens_of_a_step, "hours": plan.hours}
    return {**told, **totals, "disk_total": plan.disk.total}


def _show(name: str, cluster: Cluster, plans: list[StagePlan]) -> None:
    from sft.utils.tables import numbers_table

    out = console()
    out.print(f"{name} on {cluster}: planned, not measured")
    for plan in plans:
        out.print(f"{plan.name}: {_layout(plan)}")
    head = ("GiB of a rank", *plans[0].memory.parts(), "in all", "fullest")
    rows = [
        [plan.name, *(_gib(part) for part in plan.memory.parts().values()), *_whole(plan, cluster)] for plan in plans
    ]
    out.print(numbers_table(head, rows, text={"GiB of a rank": 14}, width=out.width))
    head = ("time, disk", "step s", "tokens/s", "steps", "tokens", "hours", "checkpoint GB", "disk GB")
    out.print(numbers_table(head, [_time(plan) for plan in plans], text={"time, disk": 14}, width=out.width))
    suites = [_suite(plan.name, suite) for plan in plans for suite in plan.suites]
    if suites:
        head = ("evaluations", "suite", "problems", "tokens at most", "hours at most", "GiB of a rank")
        out.print(numbers_table(head, suites, text={"evaluations": 14, "suite": 12}, width=out.width))
    for plan in plans:
        for line in _advice(plan, cluster):
            out.print(line, soft_wrap=True)


def _layout(plan: StagePlan) -> str:
    layout = plan.layout
    what = f"LoRA of rank {layout.adapters.rank}" if layout.adapters else "all weights"
    what += " in bfloat16" if layout.weights_width == 2 else ""
    kept = _kept(layout)
    made = f"{counted(layout.rows, 'row')} of {layout.length:,} tokens x {layout.accumulation} accumulated"
    where = f"rows {plan.rows.known}" if plan.rows.known else "rows not prepared"
    ranks = counted(layout.engine.world, "rank")
    ranks += f", {layout.sharing} to a row" if layout.sharing > 1 else ""
    return f"{what}, {layout.engine.name}, {made} x {ranks}, {kept}; {where}"


def _kept(layout: Any) -> str:
    again = layout.recompute
    if not again.layers:
        return "nothing recomputed"
    said = "layers recomputed" + (" but attention" if again.selective else "")
    return said + (", their inputs on the host" if again.offload else "")


def _gib(size: int) -> str:
    return _small(size / GIB)


def _small(number: float) -> str:
    """One digit behind the point, and what is less is told so."""
    return "<0.1" if 0 < number < 0.05 else f"{number:,.1f}"


def _tokens(number: float) -> str:
    unit, by = next(((unit, by) for unit, by in (("G", 1e9), ("M", 1e6)) if number >= by), ("", 1.0))
    return f"{number / by:.2f}{unit}" if unit else f"{number:,.0f}"


def _whole(plan: StagePlan, cluster: Cluster) -> tuple[str, str]:
    total = _gib(plan.memory.total)
    if cluster.card is None:
        return total, plan.memory.moment
    return f"{total} of {_gib(cluster.card.usable)}{'' if plan.fits else ' !'}", plan.memory.moment


def _time(plan: StagePlan) -> list[str]:
    step, disk = plan.step, plan.disk
    speed = f"{plan.tokens_of_a_step / step.seconds:,.0f}" if step else ""
    return [
        plan.name,
        _small(step.seconds) if step else "",
        speed,
        f"{plan.steps:,}" if plan.steps is not None else "?",
        _tokens(plan.tokens) if plan.tokens is not None else f"{_tokens(plan.tokens_of_a_step)} a step",
        _small(plan.hours) if plan.hours is not None else "?",
        _small(disk.checkpoint / GB),
        f"{disk.total / GB:.0f}" if disk.total is not None else "?",
    ]


def _suite(stage: str, suite: Any) -> list[str]:
    point = suite.point if suite.point in (stage, "start") else f"{stage}, {suite.times} times"
    return [
        point,
        suite.name,
        f"{suite.problems:,}" if suite.problems is not None else "?",
        _tokens(suite.tokens) if suite.tokens is not None else "?",
        f"{suite.hours:,.2f}" if suite.hours is not None else "?",
        _gib(suite.memory),
    ]


def _advice(plan: StagePlan, cluster: Cluster) -> Iterator[str]:
    if cluster.card is None:
        return
    if not plan.fits:
        room = _gib(cluster.card.usable)
        yield f"{plan.name} doesn't fit: {_gib(plan.memory.total)} GiB where {cluster.card.name} has {room}"
    if plan.smallest is not None:
        yield f"{plan.name}, the smallest change that fits ({_told(plan.smallest)}): {plan.smallest.words}"
    if plan.fastest is not None:
        yield f"{plan.name}, the fastest that fits ({_told(plan.fastest)}): {plan.fastest.words}"
    for remedy in plan.remedies:
        yield f"{plan.name} would fit with: {remedy}"
    if plan.memory.host:
        yield f"{plan.name}: and {plan.memory.host * cluster.count / GIB:.0f} GiB of host memory for all its ranks"


def _told(choice: Any) -> str:
    return f"{choice.seconds:.1f} s a step, {_gib(choice.memory.total)} GiB"
