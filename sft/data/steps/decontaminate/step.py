"""The step `decontaminate`: rows that a benchmark asks go, each with the problem that it repeats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sft.data.read.columns import ID_COLUMNS
from sft.data.read.outcomes import Dropped, Kept, Outcome
from sft.data.read.record import Record
from sft.data.read.row import Row
from sft.data.read.sources import OpenSource, open_source
from sft.data.steps.base import RowStep
from sft.data.steps.context import Context
from sft.data.steps.decontaminate.benchmark_index import BenchmarkIndex, BenchmarkProblem, Match
from sft.data.text.normalize import words
from sft.data.text.question import core
from sft.recipe.schema import Source
from sft.recipe.steps.decontaminate import Benchmark, DecontaminateStep
from sft.utils.errors import UserError

PROBLEM_COLUMNS = ("problem", "question", "Question", "prompt")
_SHOWN = 100


class Decontaminate(RowStep):
    """Drops rows whose problem is one of a benchmark's, or nearly. Reason: contaminated.

    Facts of dropped rows: benchmark, row (its id, else file:line), similarity, by (`words`, or n-grams), problem.
    """

    version = 3
    config: DecontaminateStep
    only_judges = True

    def __init__(self, config: DecontaminateStep, context: Context) -> None:
        super().__init__(config, context)
        self.problems = [problem for benchmark in config.against for problem in read_benchmark(benchmark)]
        texts = [words(core(problem.text)) for problem in self.problems]
        self.index = BenchmarkIndex(texts, config.similarity, config.ngram, config.overlap)

    @classmethod
    def identity(cls, config: DecontaminateStep) -> dict[str, Any]:
        """What each benchmark's content is keyed by. Raises UserError for a benchmark that can't be read."""
        for benchmark in config.against:
            read_benchmark(benchmark)
        return {benchmark.name: _open(benchmark).identity for benchmark in config.against}

    def __call__(self, batch: list[Record]) -> Iterator[Outcome]:
        """A row without a problem of its own is compared with all its text."""
        for record in batch:
            match = self._match(record)
            yield Kept(record) if match is None else self._dropped(record, match)

    def _match(self, record: Record) -> Match | None:
        match = self.index.match(words(record.text if record.problem is None else core(record.problem)))
        if match is None and self.config.also_text and record.messages is not None:
            return self.index.quoted(words(record.text))
        return match

    def _dropped(self, record: Record, match: Match) -> Dropped:
        problem = self.problems[match.problem]
        # A benchmark may hold half of a surrogate pair, which parquet can't.
        start = " ".join(problem.text.split())[:_SHOWN].encode("utf-8", "replace").decode("utf-8")
        record.facts["decontaminate"] = {
            "benchmark": problem.benchmark,
            "row": problem.row,
            "similarity": round(match.similarity, 4),
            "by": match.by,
            "problem": start,
        }
        detail = f"{problem.benchmark}:{problem.row}: similarity {match.similarity:.2f} ({match.by}): {start}"
        return Dropped(record, "contaminated", detail)


def read_benchmark(benchmark: Benchmark) -> list[BenchmarkProblem]:
    """All problems of a benchmark. Raises UserError where one can't be read: a gap would let its copies through."""
    opened = _open(benchmark)
    wanted, names = {benchmark.column} if benchmark.column else set(PROBLEM_COLUMNS), opened.columns() or set()
    needed = (wanted | set(ID_COLUMNS)) & names if wanted & names else None
    problems = [_problem(benchmark, row) for row in opened.read(needed)]
    if not problems:
        raise UserError(f"decontaminate: benchmark {benchmark.name}: {opened.name} has no rows.")
    return problems


def _open(benchmark: Benchmark) -> OpenSource:
    keys = ("path", "config", "split", "revision")
    return open_source(Source(**{key: getattr(benchmark, key) for key in keys}))


def _problem(benchmark: Benchmark, row: Row) -> BenchmarkProblem:
    where = f"decontaminate: benchmark {benchmark.name}: {row.source}:{row.line}"
    if row.value is None:
        raise UserError(f"{where} can't be read: {row.bad.detail if row.bad else 'no row'}; mend the file.")
    value = row.value
    column = benchmark.column or next((name for name in PROBLEM_COLUMNS if name in value), None)
    if column is None or column not in value:
        wanted = f"no column '{column}'" if column else f"none of the columns {', '.join(PROBLEM_COLUMNS)}"
        raise UserError(f"{where} has {wanted}; it has {', '.join(sorted(value))}. Set the benchmark's `column`.")
    text = value[column]
    if not isinstance(text, str) or not words(text):
        raise UserError(f"{where}: '{column}' holds no problem but {str(text)[:40]!r}; set the benchmark's `column`.")
    name = next((value[key] for key in ID_COLUMNS if isinstance(value.get(key), str | int)), None)
    return BenchmarkProblem(benchmark.name, f"{row.source}:{row.line}" if name is None else str(name), text)
