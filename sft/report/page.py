"""Put the report together: `report/index.html` (self-contained), `report/report.md` and the figures as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sft.data.engine.accounts import has_steps
from sft.evaluate.runner import read_samples
from sft.recipe.paths import RunPaths
from sft.recipe.published import published_recipe, secrets_of
from sft.recipe.schema import Recipe
from sft.report import comparisons, tables
from sft.report.chart import chart_head
from sft.report.collect import RunFacts, collect
from sft.report.drawing import unique_ids
from sft.report.figures import draw_all
from sft.report.funnel_figures import chart_data
from sft.report.headline import facts, overrides_of
from sft.report.headline import verdict as headline
from sft.utils.files import atomic_open, write_text
from sft.utils.secrets import published

_SHOWN_SAMPLES = 3
_LONGEST_TEXT = 6_000


def write_report(recipe: Recipe, paths: RunPaths) -> Path:
    """Write the report of the run, as far as it has got; returns the path of the page.

    Everything is read from the run's folder: nothing is computed anew, and no model is loaded.
    """
    run = collect(recipe, paths)
    figures = draw_all(run)
    data_figures = _data_figures(run)
    folder = paths.report
    drawn = {**figures, **{name: figure for stage in data_figures.values() for name, figure in stage.items()}}
    for name, (_, png, _) in drawn.items():
        with atomic_open(folder / "figures" / f"{name}.png", "wb") as handle:
            handle.write(png)
    typed = [*recipe.given.overrides, *overrides_of(recipe, paths)]
    secrets = secrets_of(recipe.model_dump(), recipe.given.text, typed)
    shown = {"figures": figures, "data_figures": data_figures, "chart_head": chart_head() if drawn else ""}
    content = _content(run, paths, secrets) | shown
    page = folder / "index.html"
    write_text(folder / "report.md", templates(False, secrets).get_template("report.md.j2").render(content))
    write_text(page, templates(True, secrets).get_template("page.html.j2").render(content))
    return page


def _data_figures(run: RunFacts) -> dict[str, dict[str, tuple[str, bytes, str]]]:
    """Of each stage whose data has steps: its figures, by names that are unique in the report."""
    return {
        stage.name: {f"data-{stage.name}-{name}": figure for name, figure in chart_data(stage.data).items()}
        for stage in run.stages
        if has_steps(stage.data)
    }


def templates(escape: bool, secrets: tuple[str, ...]) -> jinja2.Environment:
    """Templates; whatever text they put into the report, no secret of the run and no folder of this machine gets in."""

    def shown(value: Any) -> Any:
        plain = isinstance(value, str) and not isinstance(value, Markup)
        return published(value, secrets) if plain else value

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        finalize=shown,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    environment.filters["unique_ids"] = unique_ids
    return environment


def _content(run: RunFacts, paths: RunPaths, secrets: tuple[str, ...]) -> dict[str, Any]:
    """What both templates are filled with."""
    from sft.recipe.load import resolved_yaml

    recipe = run.recipe
    return {
        "run": run,
        "verdict": headline(run),
        "asked": any(stage.evaluate.suites for stage in recipe.stages),
        "facts": facts(run, paths),
        "title": recipe.report.title or recipe.name,
        "tables": tables,
        "results": tables.result_rows(run),
        "summary": _summary(run),
        "examples": [example for suite in run.suites if (example := _examples(run, suite))],
        **comparisons.context(run),
        "shortened": _shortened_text,
        "recipe_text": published_recipe(resolved_yaml(recipe), secrets),
        "root": paths.root.name,
    }


def _summary(run: RunFacts) -> list[tuple[str, str, str]]:
    """(label, value, note) of the numbers at the top."""
    tiles = []
    for row in tables.result_rows(run):
        own = zip(run.points, row.cells, strict=True)
        reached = [(point, cell) for point, cell in own if cell is not tables.NONE and point in run.own_points]
        if not row.group and reached:
            (first, _), (_, last) = reached[0], reached[-1]
            gain = f", {row.total_gain:+.1f} since {first}" if row.total_gain else ""
            tiles.append((f"{row.suite}, pass@1", last.value, f"95%: {last.interval}{gain}"))
    if run.parameters:
        name = run.recipe.model.model_name_or_path or "from scratch"
        tiles.append(("parameters", _short(run.parameters), name))
    done = [stage for stage in run.stages if stage.manifest]
    totals = {name: sum(stage.total(name) or 0 for stage in run.stages) for name in ("tokens", "seconds")}
    supervised = sum(stage.total("supervised_tokens") or 0 for stage in run.stages)
    tiles.append(("stages done", f"{len(done)} of {len(run.stages)}", ", ".join(stage.name for stage in run.stages)))
    if totals["tokens"]:
        tiles.append(("tokens trained on", _short(totals["tokens"]), f"{_short(supervised)} supervised"))
        tiles.append(("training time", tables.duration(totals["seconds"]), str(run.environment.get("device") or "")))
    return tiles


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def _examples(run: RunFacts, suite: str) -> dict[str, Any] | None:
    """Completions of the suite at the run's last point that has it: some right ones, some wrong, some undecided."""
    points = [point for point in run.own_points if (point, suite) in run.results]
    if not points:
        return None
    samples = read_samples(run.results[points[-1], suite].samples)
    shown: list[dict[str, Any]] = []
    for verdict in ("right", "wrong", "undecided"):
        chosen = [sample for sample in samples if sample["verdict"] == verdict]
        # Spread over the suite, so that different groups are seen.
        step = max(1, len(chosen) // _SHOWN_SAMPLES)
        shown += [_shortened(sample) for sample in chosen[::step][:_SHOWN_SAMPLES]]
    return {"suite": suite, "point": points[-1], "samples": shown} if shown else None


def _shortened(sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, "completion": _shortened_text(str(sample["completion"]))}


def _shortened_text(text: str) -> str:
    if len(text) <= _LONGEST_TEXT:
        return text
    half = _LONGEST_TEXT // 2
    return f"{text[:half]}\n\n[... {len(text) - 2 * half:,} characters left out ...]\n\n{text[-half:]}"
