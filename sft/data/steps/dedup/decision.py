"""Which units stay: exact copies by hash, near-copies by MinHash bands, confirmed, then greedily by preference.

The tables are DuckDB's, which spills; what the greedy pass needs at hand lies in files (`dedup_payload`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sft.data.steps.base import verdict_schema
from sft.data.steps.dedup.minhash import jaccard
from sft.data.steps.dedup.payload import Buckets, Payload, PayloadFile
from sft.data.steps.dedup.same_problem import same_problem
from sft.data.steps.sql import connect

if TYPE_CHECKING:
    import duckdb

# Of the texts of one bucket that stay, only so many of the most preferred are remembered, and a text is compared with
# so many of those that it meets, those with most common buckets first: work grows with the texts, not their pairs.
_REMEMBERED = 8
_COMPARED = 64
_BATCH = 8192

# Of each unit: its text, preference and name. A unit's rows have one text; if not, the smallest hash stands for it.
_UNITS = """
create table units as
select unit, min(content) as content, min(rank) as rank, min(length) as length, min(name) as name
from sketches group by unit
"""

# Distinct texts in the order of preference, each with the unit that stands for it (exact copies end here) and the row
# that carries its shingles. The order is a function of what is in the rows, not of where they stand.
_NODES = """
create table nodes as
with winners as (
    select content, arg_min(unit, (rank, length, unit)) as unit from units where content is not null group by content
), carriers as (
    select content, arg_min(row, form) as carrier from sketches where {carries} group by content
)
select row_number() over (order by units.rank, units.length, content) - 1 as node, content, unit, units.name, carrier
from winners join units using (unit, content) left join carriers using (content)
"""

# One row for each text in each bucket that it shares. A bucket is a band's key; what is in a bucket of more than are
# remembered is also in a finer one, by this band and the next, so that near-copies in a crowd of others still meet.
_BUCKETS = f"""
create table buckets as
with keys as (
    select node, unnest(bands) as key, unnest(list_concat(bands[2:], bands[:1])) as next_key
    from sketches join nodes on sketches.row = nodes.carrier
), sized as (
    select key, count(*) as size from keys group by key having count(*) > 1
), members as (
    select node, key, 0::ubigint as finer from keys join sized using (key)
    union all
    select node, key, next_key as finer from keys join sized using (key) where size > {_REMEMBERED}
), numbered as (
    select key, finer, row_number() over () - 1 as bucket from members group by key, finer having count(*) > 1
)
select node, bucket from members join numbered using (key, finer)
"""

_PAYLOADS = """
select node, shingles, coalesce(text, '') as text from sketches join nodes on sketches.row = nodes.carrier
where node in (select node from buckets)
"""

_VERDICTS = """
create table fates as
select units.unit, kept.unit as kept, kept.name, coalesce(near.similarity, 1.0) as similarity,
    near.node is not null as is_near
from units join nodes using (content)
left join near on near.node = nodes.node
join nodes as kept on kept.node = coalesce(near.other, nodes.node)
"""

_OUTPUT = """
with counts as (
    select kept as unit, count(*) - 1 as copies from fates group by kept having count(*) > 1
)
select row, 0::integer as copies, case when is_near then 'near_duplicate' else 'duplicate' end as reason,
    format('copy of {}, similarity {:.2f}', fates.name, similarity) as detail,
    json_object('kept', fates.name, 'similarity', round(similarity, 4))::varchar as facts
from sketches join fates using (unit) where fates.unit <> fates.kept
union all
select row, 1::integer, null, null, json_object('copies', counts.copies)::varchar from sketches join counts using (unit)
order by row
"""


class Near(NamedTuple):
    """Text `node` is near text `other`, which stays."""

    node: int
    other: int
    similarity: float


def decide(sketches: Sequence[Path], verdicts: Path, scratch: Path, threshold: float | None) -> None:
    """Write the verdicts of `sketches` (columns of `dedup.sketch_schema()` and `row`); None: exact copies only."""
    with connect(scratch) as database:
        database.from_parquet([str(path) for path in sketches]).create_view("sketches")
        database.execute(_UNITS)
        database.execute(_NODES.format(carries="false" if threshold is None else "bands is not null"))
        near = scratch / "near.parquet"
        _write_near(near, () if threshold is None else _near(database, scratch, threshold))
        database.from_parquet(str(near)).create_view("near")
        database.execute(_VERDICTS)
        with pq.ParquetWriter(verdicts, verdict_schema()) as writer:
            for batch in database.sql(_OUTPUT).to_arrow_reader(_BATCH):
                writer.write_table(pa.Table.from_batches([batch]).cast(verdict_schema()))


def _near_schema() -> pa.Schema:
    return pa.schema([("node", pa.int64()), ("other", pa.int64()), ("similarity", pa.float64())])


def _write_near(path: Path, found: Iterable[Near]) -> None:
    rows = iter(found)
    with pq.ParquetWriter(path, _near_schema()) as writer:
        while part := list(islice(rows, _BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist([row._asdict() for row in part], schema=_near_schema()))


def _near(database: duckdb.DuckDBPyConnection, scratch: Path, threshold: float) -> Iterator[Near]:
    """Each text that is near a preferred one that stays, with that one. In the order of preference: what a text is
    compared with is known to stay."""
    database.execute(_BUCKETS)
    ((texts,),) = database.execute("select count(*) from nodes").fetchall()
    ((buckets,),) = database.execute("select count(distinct bucket) from buckets").fetchall()
    staying = Buckets(scratch / "staying", buckets, _REMEMBERED)
    with PayloadFile(scratch / "payloads", texts) as payloads:
        for batch in database.sql(_PAYLOADS).to_arrow_reader(_BATCH):
            payloads.add(batch)
        for node, places in _grouped(database.sql("from buckets order by node").to_arrow_reader(_BATCH)):
            ours = payloads[node]
            for other in staying.met(places)[:_COMPARED]:
                similarity = _similarity(ours, payloads[other], threshold)
                if similarity is not None:
                    yield Near(node, other, similarity)
                    break
            else:
                staying.add(node, places)


def _grouped(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """(node, its buckets) of rows sorted by node; the rows of a node may be spread over batches."""
    rest = np.zeros((2, 0), np.int64)
    for batch in batches:
        rows = np.concatenate([rest, [column.to_numpy() for column in batch.columns]], axis=1)
        starts = np.flatnonzero(np.diff(rows[0], prepend=-1))
        for start, end in pairwise(starts.tolist()):
            yield int(rows[0, start]), rows[1, start:end]
        rest = rows[:, starts[-1] :]
    if rest.size:
        yield int(rest[0, 0]), rest[1]


def _similarity(one: Payload, other: Payload, threshold: float) -> float | None:
    """Their similarity by the shingles themselves; None if it is too low, or they are two problems by their words."""
    similarity = jaccard(one.shingles, other.shingles)
    if similarity < threshold:
        return None
    if one.text and other.text and not same_problem(one.text.split(" "), other.text.split(" ")):
        return None
    return similarity
