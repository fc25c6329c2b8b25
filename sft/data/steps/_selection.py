"""The cuts of the step `select`, in DuckDB. What a cut drops is noted in `fate`; the next sees only what is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.pipeline.context import Context
from sft.data.steps._budget import Budget, apportion, exact_shares, fill, largest_total, no_such
from sft.data.steps._tables import batches, parquet, quoted, write_verdicts
from sft.errors import UserError
from sft.recipe.steps.select import Lengths, PassRate, Quotas, SelectStep

if TYPE_CHECKING:
    import duckdb

BATCH_PROBLEMS = 2048
# How each preference sorts. Equal draws are as good as impossible; names settle even those.
_ORDER = {
    "shortest": "tokens",
    "longest": "tokens DESC",
    "teacher": "teacher DESC NULLS LAST",
    "teacher_tokens": "teacher_tokens DESC NULLS LAST",
}
_LAST = "draw, source, id, place"


class Selection:
    """One run of the step."""

    def __init__(self, db: duckdb.DuckDBPyConnection, config: SelectStep, context: Context, scratch: Path) -> None:
        self._db, self._config, self._context, self._scratch = db, config, context, scratch
        self._order = ", ".join([*(_ORDER[name] for name in config.prefer if name != "random"), _LAST])

    def read(self, sketches: Sequence[Path]) -> None:
        """Open the sketches. Raises UserError when the rows have no score though one is preferred."""
        self._db.execute(f"CREATE VIEW sketches AS SELECT * FROM {parquet(sketches)}")
        columns = "row, source, id, place, problem, domain, tokens, draw, pass_rate, verdict, teacher, teacher_tokens"
        self._db.execute(f"CREATE TABLE candidates AS SELECT {columns} FROM sketches")
        self._db.execute("CREATE TABLE fate (row BIGINT, reason VARCHAR, detail VARCHAR)")
        self._db.execute('CREATE VIEW remaining AS SELECT * FROM candidates ANTI JOIN fate USING ("row")')
        for name in ("teacher", "teacher_tokens"):
            if name in self._config.prefer and self._one(f"SELECT count(*) > 0 AND count({name}) = 0 FROM candidates"):
                raise UserError(f"select: prefers {name}, but no row has a score; put the step `score` before it.")

    def run(self) -> None:
        """All cuts, in their order."""
        config = self._config
        if self._needs_lengths():
            self._drop("tokens IS NULL", "no_conversation", "'a problem without an answer has no length'")
        if config.pass_rate is not None:
            self._cut_pass_rate(config.pass_rate)
        if config.per_problem is not None:
            self._cut_per_problem(config.per_problem)
        if config.diversity is not None:
            self._cluster(config.diversity.clusters)
        if config.quotas is not None:
            self._cut_quotas(config.quotas)
        if config.lengths is not None:
            self._cut_lengths(config.lengths)
        elif config.rows is not None or config.tokens is not None:
            self._fill("''", {"": Budget(config.rows, config.tokens)}, "over_rows", "over_tokens")

    def write(self, verdicts: Path) -> None:
        """Write the verdicts: rows dropped, and facts of those kept."""
        facts = {"pass_rate": "pass_rate", "cluster": "cluster"}
        if self._config.pass_rate is None:
            del facts["pass_rate"]
        if self._config.diversity is None:
            del facts["cluster"]
        query = "SELECT row, 0 AS copies, reason, detail, NULL AS facts FROM fate"
        if facts:
            fields = ", ".join(f"'{name}', {column}" for name, column in facts.items())
            turns = 'JOIN turns USING ("row")' if "cluster" in facts else ""
            query += f" UNION ALL SELECT row, 1, NULL, NULL, json_object({fields}) FROM remaining {turns}"
        write_verdicts(self._db, query, verdicts)

    def _needs_lengths(self) -> bool:
        config = self._config
        quota_tokens = config.quotas is not None and bool(config.quotas.tokens)
        by_length = bool({"shortest", "longest"} & set(config.prefer))
        return config.tokens is not None or config.lengths is not None or quota_tokens or by_length

    def _cut_pass_rate(self, settings: PassRate) -> None:
        if settings.of == "verdicts":
            self._rate_by_verdicts()
            kept = ", ".join(f"'{verdict}'" for verdict in settings.verdicts)
            self._drop(f"verdict IS NULL OR verdict NOT IN ({kept})", "verdict", "coalesce(verdict, 'no verdict')")
        elif self._one("SELECT count(*) > 0 AND count(pass_rate) = 0 FROM candidates"):
            what = "explode_rollouts noted none" if settings.of == "rollouts" else f"{settings.column} holds none"
            raise UserError(f"select: no row has a pass rate ({what}); see `of` of select's pass_rate.")
        outside = f"pass_rate < {settings.min} OR pass_rate > {settings.max}"
        numbers = f"printf('%.4g, not within {settings.min:g} to {settings.max:g}', pass_rate)"
        self._drop(outside, "pass_rate", numbers)
        if settings.missing == "drop":
            self._drop("pass_rate IS NULL", "no_pass_rate", "'the problem has no pass rate'")

    def _rate_by_verdicts(self) -> None:
        if self._one("SELECT count(*) > 0 AND count(*) FILTER (verdict = 'wrong') = 0 FROM candidates"):
            raise UserError(
                "select: no row has the verdict wrong, so every pass rate would be 1; "
                "let verify keep both before it: `verify: {keep: [right, wrong]}`."
            )
        self._db.execute(
            "CREATE TABLE rates AS SELECT source, problem, count(*) FILTER (verdict = 'right')"
            " / nullif(count(*) FILTER (verdict IN ('right', 'wrong')), 0) AS rate"
            " FROM candidates GROUP BY source, problem"
        )
        self._db.execute(
            "UPDATE candidates SET pass_rate = rate FROM rates WHERE candidates.source = rates.source"
            " AND candidates.problem = rates.problem"
        )

    def _cut_per_problem(self, most: int) -> None:
        self._db.execute(
            "INSERT INTO fate SELECT row, 'over_per_problem',"
            f" printf('number %d of the %d answers to its problem, of which {most} are taken', number, answers) FROM ("
            f" SELECT row, row_number() OVER (PARTITION BY source, problem ORDER BY {self._order}) AS number,"
            f" count(*) OVER (PARTITION BY source, problem) AS answers FROM remaining) WHERE number > {most}"
        )

    def _cluster(self, clusters: int) -> None:
        """From here on rows go in turns: the first of every cluster, then the second of every cluster."""
        path = self._scratch / "clusters.parquet"
        ClusterTable(self._db, self._context, self._scratch).write(clusters, path)
        self._db.execute(
            "CREATE TABLE turns AS SELECT row, cluster, row_number() OVER"
            f" (PARTITION BY cluster ORDER BY {self._order}) AS turn"
            f" FROM remaining JOIN {parquet([path])} USING (source, problem)"
        )

    def _cut_quotas(self, quotas: Quotas) -> None:
        by = quotas.by
        known = [name for (name,) in self._db.execute(f"SELECT DISTINCT {by} FROM candidates").fetchall()]
        unknown = sorted(quotas.names - set(known))
        if known and unknown:
            raise no_such("select", by, unknown, known)
        if quotas.others == "drop":
            self._drop(
                f"{by} IS NULL OR {by} NOT IN ({', '.join(map(quoted, sorted(quotas.names)))})",
                "quota",
                f"coalesce({by}, 'no {by}') || ': has no quota'",
            )
        budgets = {name: Budget(quotas.rows.get(name), quotas.tokens.get(name), name) for name in quotas.names}
        self._fill(by, budgets, "quota", "quota")

    def _cut_lengths(self, settings: Lengths) -> None:
        names = _buckets(settings.edges)
        cases = " ".join(
            f"WHEN tokens <= {edge} THEN '{name}'" for edge, name in zip(settings.edges, names, strict=False)
        )
        bucket = f"CASE {cases} ELSE '{names[-1]}' END"
        shares = dict(zip(names, exact_shares(settings.shares), strict=True))
        size = "count(*)" if settings.of == "rows" else "sum(tokens)"
        available = {name: int(sum_) for name, sum_ in self._all(f"SELECT {bucket}, {size} FROM remaining GROUP BY 1")}
        if not available:
            return
        empty = [name for name in names if shares[name] and not available.get(name)]
        if empty:
            raise UserError(
                f"select: no row of {empty[0]}, so that its share of the lengths can't be met; set it to 0."
            )
        total = largest_total(available, shares)
        total = min(total, (self._config.rows if settings.of == "rows" else self._config.tokens) or total)
        parts = dict(zip(names, apportion(total, list(shares.values())), strict=True))
        budgets = {name: Budget(**{settings.of: part}, name=name) for name, part in parts.items()}
        self._fill(bucket, budgets, "length_bucket", "length_bucket")

    def _fill(self, group: str, budgets: dict[str, Budget], over_rows: str, over_tokens: str) -> None:
        order, source = self._order, "remaining"
        if self._config.diversity is not None:
            order, source = f"turn, {order}", 'remaining JOIN turns USING ("row")'
        path = self._scratch / f"refused-{self._one('SELECT count(*) FROM fate')}-{over_rows}.parquet"
        query = f"SELECT row, {group}, tokens FROM {source} ORDER BY {order}"
        fill(self._db, query, budgets, {"rows": over_rows, "tokens": over_tokens}, path)
        self._db.execute(f"INSERT INTO fate SELECT * FROM {parquet([path])}")

    def _drop(self, condition: str, reason: str, detail: str) -> None:
        self._db.execute(f"INSERT INTO fate SELECT row, '{reason}', {detail} FROM remaining WHERE {condition}")

    def _one(self, query: str) -> Any:
        return self._all(query)[0][0]

    def _all(self, query: str) -> list[tuple[Any, ...]]:
        return self._db.execute(query).fetchall()


class ClusterTable:
    """Which cluster each problem belongs to, of the rows in `remaining` and `sketches`."""

    def __init__(self, db: duckdb.DuckDBPyConnection, context: Context, scratch: Path) -> None:
        self._db, self._context, self._scratch = db, context, scratch
        # Rows of one problem say the same; where they don't, the first drawn speaks for it.
        db.execute(
            "CREATE TABLE problems AS SELECT source, problem, any_value(problem_draw) AS draw,"
            ' arg_min(words, sketches.draw) AS words FROM sketches SEMI JOIN remaining USING ("row")'
            " GROUP BY source, problem"
        )

    def write(self, clusters: int, target: Path) -> None:
        """Write (source, problem, cluster) to the parquet file `target`. The sample is of the problems drawn first."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        from sft.data.clusters import SAMPLE, WordVectors, assign, centroids

        vectors = WordVectors(self._words(), self._context.seed)
        first = self._words(f"ORDER BY draw, source, problem LIMIT {SAMPLE}")
        sample = np.concatenate([vectors([]), *map(vectors, first)])
        schema = pa.schema([("source", pa.string()), ("problem", pa.string()), ("cluster", pa.int32())])
        with pq.ParquetWriter(target, schema) as writer:
            if not len(sample):
                return
            centers = centroids(sample, clusters, partial(self._context.uniform, "select clusters"))
            for batch in self._batches("SELECT source, problem, words FROM problems"):
                sources, problems, words = zip(*batch, strict=True)
                table = pa.table([sources, problems, assign(vectors(words), centers)], schema=schema)
                writer.write_table(table)

    def _words(self, rest: str = "") -> Iterator[list[Any]]:
        for batch in self._batches(f"SELECT words FROM problems {rest}"):
            yield [words for (words,) in batch]

    def _batches(self, query: str) -> Iterator[list[tuple[Any, ...]]]:
        return batches(self._db, query, self._scratch / "problems.parquet", BATCH_PROBLEMS)


def _buckets(edges: Sequence[int]) -> list[str]:
    lows = [1, *(edge + 1 for edge in edges)]
    return [*(f"{low} to {edge} tokens" for low, edge in zip(lows, edges, strict=False)), f"{lows[-1]} tokens or more"]
