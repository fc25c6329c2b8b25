"""`sft preview`: rows as they will be trained on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.cli.common import (
    add_recipe_arguments,
    console,
    dry_run,
    file_path,
    positive,
    prepare_with_progress,
    recipe_of,
    stages_of,
    whole,
)
from sft.recipe import RunPaths
from sft.utils.errors import UsageError, UserError
from sft.utils.quiet import quiet_libraries
from sft.utils.tables import counted

if TYPE_CHECKING:
    from sft.data.prepare import PreparedStage

TAKES_OVERRIDES = True
PARTS = ("data",)
ROWS, PAGE_ROWS = 2, 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe's options, which rows, and whether as a page."""
    add_recipe_arguments(parser)
    text = f"rows to show of each stage (default {ROWS}, on a page {PAGE_ROWS})"
    parser.add_argument("--rows", type=positive, metavar="N", help=text)
    parser.add_argument("--row", type=_number, metavar="N", action="append", help="this row (again: and this one)")
    parser.add_argument("--id", metavar="ROW_ID", help="the rows that hold the document with this id")
    parser.add_argument(
        "--html", type=file_path, metavar="FILE", help="write a page instead (with several stages: FILE-STAGE)"
    )


def _number(text: str) -> int:
    number = whole(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"rows are counted from 0, not {number}")
    return number


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Prepare where needed, then show."""
    if sum(option is not None for option in (arguments.rows, arguments.row, arguments.id)) > 1:
        raise UsageError("--rows, --row and --id exclude each other; see `sft preview --help`")
    recipe = recipe_of(arguments, overrides)
    if arguments.dry_run:
        from sft.run.outlook import outlook

        plan = [
            *outlook(recipe, arguments.stage, PARTS),
            f"then: {_wanted(arguments)} of each stage {_where(arguments)}",
        ]
        return dry_run(arguments, recipe, plan, PARTS)
    quiet_libraries(RunPaths(recipe).root, debug=arguments.debug)
    from sft.run.checks import check_recipe
    from sft.tokenizers.load import start_tokenizer

    check_recipe(recipe, ("data",), stage=arguments.stage)
    tokenizer = start_tokenizer(recipe.model)
    stages, shown = stages_of(recipe, arguments), False
    for stage in stages:
        prepared = prepare_with_progress(recipe, stage, tokenizer)
        numbers = _chosen(prepared, arguments)
        if arguments.id is not None and not numbers:
            continue
        shown = True
        title = f"{recipe.name}: {stage.name}"
        told = arguments.told.setdefault("stages", {}).setdefault(stage.name, {})
        told["rows"] = _rows_told(prepared, tokenizer, numbers, arguments) if arguments.json else []
        if arguments.html is None:
            _show(prepared, tokenizer, title, numbers, arguments)
        else:
            _write(prepared, tokenizer, title, numbers, _page(arguments.html, stage.name if len(stages) > 1 else ""))
    if not shown:
        raise UserError(
            f"No row to train on has the id {arguments.id!r}; `sft prepare --explain` tells what became of it."
        )
    return 0


def _rows_told(
    prepared: PreparedStage, tokenizer: Any, numbers: list[int], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows with their documents, whose text lies in stretches that are trained on or not."""
    from sft.data.look.find import same_row
    from sft.data.look.preview import cut_lengths, documents_of

    told = []
    for number in numbers:
        row = prepared.dataset[number]
        documents = [
            {
                "id": document.name,
                "tokens": document.tokens,
                "trained_tokens": document.trained,
                "cut_tokens": document.missing,
                "text": [{"kind": segment.kind, "text": segment.text} for segment in document.segments],
            }
            for document in documents_of(row, tokenizer, cut_lengths(prepared, [row]))
            if arguments.id is None or same_row(document.name, arguments.id)
        ]
        told.append({"number": number, "tokens": len(row["input_ids"]), "documents": documents})
    return told


def _chosen(prepared: PreparedStage, arguments: argparse.Namespace) -> list[int]:
    """Numbers of the rows that are meant."""
    from sft.data.look.find import check_row, rows_with

    if arguments.id is not None:
        return rows_with(prepared, arguments.id)
    if arguments.row is not None:
        return [check_row(prepared, number) for number in arguments.row]
    return list(range(min(_count(arguments), len(prepared.dataset))))


def _wanted(arguments: argparse.Namespace) -> str:
    if arguments.id is not None:
        return f"the rows with the document {arguments.id}"
    if arguments.row is not None:
        return f"row {' and '.join(map(str, arguments.row))}"
    return counted(_count(arguments), "row")


def _where(arguments: argparse.Namespace) -> str:
    return "on the terminal" if arguments.html is None else f"as a page, {arguments.html}"


def _count(arguments: argparse.Namespace) -> int:
    return int(arguments.rows or (ROWS if arguments.html is None else PAGE_ROWS))


def _show(
    prepared: PreparedStage, tokenizer: Any, title: str, numbers: list[int], arguments: argparse.Namespace
) -> None:
    from sft.data.look.preview import show_lengths, show_numbers, show_rows

    out = console()
    # Who asks for a row wants to see that row.
    if arguments.row is None and arguments.id is None:
        show_numbers(prepared, out, title)
        show_lengths(prepared, out)
    else:
        out.print(title, markup=False)
    show_rows(prepared, tokenizer, numbers, out, only=arguments.id)


def _page(file: str, stage: str) -> Path:
    page = Path(file)
    return page.with_name(f"{page.stem}-{stage}{page.suffix}") if stage else page


def _write(prepared: PreparedStage, tokenizer: Any, title: str, numbers: list[int], page: Path) -> None:
    from sft.data.look.page import write_page
    from sft.report.chart import chart_head
    from sft.report.drawing import unique_ids
    from sft.report.funnel_figures import chart_data

    drawn = chart_data(prepared.manifest)
    # The page shows the funnel as a table with bars already.
    figures = {name: (unique_ids(svg, name), text) for name, (svg, _, text) in drawn.items() if name != "funnel"}
    write_page(prepared, tokenizer, page, title=title, numbers=numbers, figures=figures, head=chart_head())
    print(page)
