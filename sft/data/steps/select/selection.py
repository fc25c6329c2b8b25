"""The cuts of the step `select`, in DuckDB, each from a parquet file to the next: no table has to fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.steps.budget import Budget, apportion, exact_shares, fill, largest_total, no_such
from sft.data.steps.context import Context
from sft.data.steps.tables import batches, parquet, quoted, write_parquet, write_verdicts
from sft.recipe.steps.select import SCORES, STUDENT_VIEWS, Lengths, PassRate, Quotas, SelectStep
from sft.utils.errors import UserError

if TYPE_CHECKING:
    import duckdb

BATCH_PROBLEMS = 2048
# How each preference sorts.
_ORDER = {
    "shortest": "tokens",
    "longest": "tokens DESC",
    "teacher": "teacher DESC NULLS LAST",
    "teacher_tokens": "teacher_tokens DESC NULLS LAST",
    "rank_surprisal": "rank_surprisal NULLS LAST",
    "local_naturalness": "local_naturalness DESC NULLS LAST",
}
_LAST = "draw, tie"


class Selection:
    """One run of the step."""

    def __init__(self, db: duckdb.DuckDBPyConnection, config: SelectStep, context: Context, scratch: Path) -> None:
        self._db, self._config, self._context, self._scratch = db, config, context, scratch
        self._fates: list[Path] = []
        self._files = 0
        self._order = ", ".join([*(_ORDER[name] for name in config.prefer if name != "random"), _LAST])

    def read(self, sketches: Sequence[Path]) -> None:
        """Open the sketches. Raises UserError when the rows have no score though one is preferred."""
        self._db.execute(f"CREATE VIEW sketches AS SELECT * FROM {parquet(sketches)}")
        self._db.execute("CREATE VIEW candidates AS SELECT * EXCLUDE (words, problem_draw) FROM sketches")
        for name in set(SCORES) & set(self._config.prefer):
            if self._one(f"SELECT count(*) > 0 AND count({name}) = 0 FROM candidates"):
                asked = f" with `{name}: {{}}`" if name in STUDENT_VIEWS else ""
                raise UserError(
                    f"select: prefers {name}, but no row has that score; put the step `score`{asked} before it."
                )

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
        facts = []
        if self._config.pass_rate is not None:
            facts.append("'pass_rate', pass_rate")
        if self._config.diversity is not None:
            facts.append("'cluster', cluster")
        noted, some = (f"json_object({', '.join(facts)})", "true") if facts else ("NULL::VARCHAR", "false")
        path = self._new_file()
        write_parquet(self._db, f'SELECT "row", 1 AS copies, {noted} AS facts FROM candidates WHERE {some}', path)
        write_verdicts(self._db, self._fates, path, verdicts)

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
        self._go_on_with(
            "SELECT * REPLACE (count(*) FILTER (verdict = 'right') OVER problems"
            " / nullif(count(*) FILTER (verdict IN ('right', 'wrong')) OVER problems, 0) AS pass_rate)"
            " FROM candidates WINDOW problems AS (PARTITION BY problem)"
        )

    def _cut_per_problem(self, most: int) -> None:
        self._go_on_with(
            f'SELECT *, row_number() OVER (PARTITION BY problem ORDER BY {self._order}) AS "number",'
            " count(*) OVER (PARTITION BY problem) AS answers FROM candidates"
        )
        detail = (
            f"""printf('number %d of the %d answers to its problem, of which {most} are taken', "number", answers)"""
        )
        self._drop(f'"number" > {most}', "over_per_problem", detail)

    def _cluster(self, clusters: int) -> None:
        """From here on rows go in turns: the first of every cluster, then the second of every cluster."""
        path = self._scratch / "clusters.parquet"
        ClusterTable(self._db, self._context, self._scratch).write(clusters, path)
        self._go_on_with(
            f"SELECT *, row_number() OVER (PARTITION BY cluster ORDER BY {self._order}) AS turn"
            f" FROM candidates JOIN {parquet([path])} USING (problem)"
        )
        self._order = f"turn, {self._order}"

    def _cut_quotas(self, quotas: Quotas) -> None:
        by = quotas.by
        known = [name for (name,) in self._all(f"SELECT DISTINCT {by} FROM sketches")]
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
        available = {name: int(sum_) for name, sum_ in self._all(f"SELECT {bucket}, {size} FROM candidates GROUP BY 1")}
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
        path = self._new_file()
        query = f'SELECT "row", {group}, tokens FROM candidates ORDER BY {self._order}'
        fill(self._db, query, budgets, {"rows": over_rows, "tokens": over_tokens}, path)
        self._fates.append(path)
        self._go_on_with(f'SELECT * FROM candidates ANTI JOIN {parquet([path])} USING ("row")')

    def _drop(self, condition: str, reason: str, detail: str) -> None:
        path = self._new_file()
        fate = f"SELECT \"row\", '{reason}' AS reason, {detail} AS detail FROM candidates WHERE {condition}"
        write_parquet(self._db, fate, path)
        self._fates.append(path)
        self._go_on_with(f"SELECT * FROM candidates WHERE NOT coalesce({condition}, false)")

    def _go_on_with(self, query: str) -> None:
        """`candidates` becomes what `query` gives."""
        path = self._new_file()
        write_parquet(self._db, query, path)
        self._db.execute(f"CREATE OR REPLACE VIEW candidates AS SELECT * FROM {parquet([path])}")

    def _new_file(self) -> Path:
        self._files += 1
        return self._scratch / f"{self._files}.parquet"

    def _one(self, query: str) -> Any:
        return self._all(query)[0][0]

    def _all(self, query: str) -> list[tuple[Any, ...]]:
        return self._db.execute(query).fetchall()


class ClusterTable:
    """Which cluster each problem belongs to, of the rows in `candidates` and `sketches`."""

    def __init__(self, db: duckdb.DuckDBPyConnection, context: Context, scratch: Path) -> None:
        self._db, self._context, self._scratch = db, context, scratch
        # Rows of one problem say the same; where they don't, the first drawn speaks for it.
        speakers = 'SELECT problem, arg_min("row", (draw, tie)) AS "row" FROM candidates GROUP BY problem'
        query = f'SELECT problem, problem_draw AS draw, words FROM sketches SEMI JOIN ({speakers}) USING ("row")'
        path = scratch / "problems.parquet"
        write_parquet(db, query, path)
        db.execute(f"CREATE VIEW problems AS SELECT * FROM {parquet([path])}")

    def write(self, clusters: int, target: Path) -> None:
        """Write (problem, cluster) to the parquet file `target`. The sample is of the problems drawn first."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        from sft.data.steps.select.clusters import SAMPLE, WordVectors, assign, centroids

        vectors = WordVectors(self._words(), self._context.seed)
        first = self._words(f"ORDER BY draw, problem LIMIT {SAMPLE}")
        sample = np.concatenate([vectors([]), *map(vectors, first)])
        schema = pa.schema([("problem", pa.int64()), ("cluster", pa.int32())])
        with pq.ParquetWriter(target, schema) as writer:
            if not len(sample):
                return
            centers = centroids(sample, clusters, partial(self._context.uniform, "select clusters"))
            for batch in self._batches("SELECT problem, words FROM problems"):
                problems, words = zip(*batch, strict=True)
                table = pa.table([problems, assign(vectors(words), centers)], schema=schema)
                writer.write_table(table)

    def _words(self, rest: str = "") -> Iterator[list[Any]]:
        for batch in self._batches(f"SELECT words FROM problems {rest}"):
            yield [words for (words,) in batch]

    def _batches(self, query: str) -> Iterator[list[tuple[Any, ...]]]:
        return batches(self._db, query, self._scratch / "batches.parquet", BATCH_PROBLEMS)


def _buckets(edges: Sequence[int]) -> list[str]:
    lows = [1, *(edge + 1 for edge in edges)]
    return [*(f"{low} to {edge} tokens" for low, edge in zip(lows, edges, strict=False)), f"{lows[-1]} tokens or more"]
