"""The report's section on data: the funnel of a stage's steps and its figures, in both files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from browser import look
from data_toys import byte_tokenizer, stage_of

from sft.data.prepare import prepare_stage
from sft.recipe import RunPaths
from sft.report import write_report
from sft.utils.files import write_sealed


@pytest.fixture
def paths(tmp_path: Path) -> Any:
    """A run whose one stage is trained, on data that went through steps."""
    rows = [{"prompt": f"What is {n}?", "completion": f"{n} " * (1 + n % 30)} for n in range(90)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [{"length": {"min_tokens": 20, "max_tokens": 80}}, {"select": {"rows": 40}}]
    train = {"max_length": 128, "packing": True, "dataset_num_proc": 1}
    recipe = stage_of([{"path": str(tmp_path / "rows.jsonl")}], tmp_path / "run", train, {"steps": steps})
    prepared = prepare_stage(recipe, recipe.stages[0], byte_tokenizer())
    found = RunPaths(recipe)
    found.stage_manifest("sft").parent.mkdir(parents=True)
    write_sealed(found.stage_manifest("sft"), {"steps": 3, "data": prepared.manifest})
    return found


def test_the_funnel_is_in_the_page_and_in_the_markdown(paths: RunPaths) -> None:
    page = write_report(paths.recipe, paths)
    markdown = (page.parent / "report.md").read_text(encoding="utf-8")
    entries = json.loads(paths.stage_manifest("sft").read_text())["data"]["steps"]
    for entry in entries:
        title = "rows to train on" if entry["step"] == "fit" else entry["title"]
        cells = [title, f"{entry['taken']['rows']:,}", f"{entry['kept']['rows']:,}"]
        assert f"| {' | '.join(cells)} |" in markdown, cells
    (select,) = [line for line in markdown.splitlines() if line.startswith("| select |")]
    assert f"over_rows {entries[-2]['dropped']['rows']}" in select
    for name in ("funnel", "lengths", "sources"):
        assert (page.parent / "figures" / f"data-sft-{name}.png").is_file()
        assert f"](figures/data-sft-{name}.png)" in markdown
        assert f'id="data-sft-{name}-' in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1200, False)])
def test_the_page_in_a_browser(paths: RunPaths, width: int, dark: bool) -> None:
    page = write_report(paths.recipe, paths)
    script = "{content: root.scrollWidth, sheet: page.getComputedStyle(page.document.body).backgroundColor}"
    seen = look(page, script, width=width, dark=dark)
    assert seen["console"] == [] and seen["content"] <= width
    assert (seen["sheet"] == "rgb(255, 255, 255)") != dark
