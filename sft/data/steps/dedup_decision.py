"""Which units stay: exact copies by hash, near-copies by MinHash bands, confirmed, then greedily by preference.

All tables are DuckDB's, which spills; Python holds one batch of pairs and a bit for each distinct text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft.data.minhash import jaccard
from sft.data.pipeline.sql import connect
from sft.data.same_problem import same_problem
from sft.data.steps.dedup_payload import Payload, PayloadFile

if TYPE_CHECKING:
    import duckdb

# Within one bucket a text is paired with so many of its most preferred texts, and with so many neighbours in the
# order of its next band (where near-copies stand together): a bucket of n texts costs 16 n pairs, never n^2. Of all its
# pairs a text is compared with those that share most bands, which are the most similar, and with the most preferred,
# which are likely to stay.
_FIRST = 8
_NEIGHBOURS = 8
_MOST_SIMILAR = 16
_MOST_PREFERRED = 16
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
    select content, min(row) as carrier from sketches where {carries} group by content
)
select row_number() over (order by units.rank, units.length, content) - 1 as node, content, unit, units.name, carrier
from winners join units using (unit, content) left join carriers using (content)
"""

_PAYLOADS = """
select node, shingles, coalesce(text, '') as text from sketches join nodes on sketches.row = nodes.carrier
where node in (select node from pairs union select other from pairs)
"""

_BUCKETS = """
create table buckets as
with keys as (
    select node, unnest(bands) as key, unnest(list_concat(bands[2:], bands[:1])) as next_key
    from sketches join nodes on sketches.row = nodes.carrier
)
select * from keys where key in (select key from keys group by key having count(*) > 1)
"""

_PAIRS = f"""
create table pairs as
with ranked as (
    select node, key, row_number() over (partition by key order by node) as place from buckets
), neighbours as (
    select node, unnest([{", ".join(f"lag(node, {n}) over near" for n in range(1, _NEIGHBOURS + 1))}]) as other
    from buckets window near as (partition by key order by next_key, node)
), met as (
    select later.node as node, earlier.node as other
    from ranked as later join ranked as earlier using (key)
    where earlier.place <= {_FIRST} and earlier.node < later.node
    union all
    select greatest(node, other), least(node, other) from neighbours where other is not null
), counted as (
    select node, other, count(*) as shared from met group by node, other
)
select node, other from counted
qualify row_number() over (partition by node order by shared desc, other) <= {_MOST_SIMILAR}
or row_number() over (partition by node order by other) <= {_MOST_PREFERRED}
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
copy (
    with counts as (select kept as unit, count(*) - 1 as copies from fates group by kept having count(*) > 1)
    select row::bigint as row, 0::integer as copies,
        case when is_near then 'near_duplicate' else 'duplicate' end as reason,
        format('copy of {}, similarity {:.2f}', fates.name, similarity) as detail,
        json_object('kept', fates.name, 'similarity', round(similarity, 4))::varchar as facts
    from sketches join fates using (unit) where fates.unit <> fates.kept
    union all
    select row::bigint, 1::integer, null, null, json_object('copies', counts.copies)::varchar
    from sketches join counts using (unit)
    order by row
) to $target (format parquet)
"""


def decide(sketches: Sequence[Path], verdicts: Path, scratch: Path, threshold: float | None) -> None:
    """Write the verdicts of `sketches` (columns of `dedup.sketch_schema()` and `row`); None: exact copies only."""
    with connect(scratch) as database:
        database.from_parquet([str(path) for path in sketches]).create_view("sketches")
        database.execute(_UNITS)
        database.execute(_NODES.format(carries="false" if threshold is None else "bands is not null"))
        near = scratch / "near.parquet"
        if threshold is not None:
            database.execute(_BUCKETS)
            database.execute(_PAIRS)
            database.execute("drop table buckets")
        with pq.ParquetWriter(near, _near_schema()) as writer:
            for batch in _near(database, scratch, threshold) if threshold is not None else ():
                writer.write_batch(batch)
        database.from_parquet(str(near)).create_view("near")
        database.execute(_VERDICTS)
        database.execute(_OUTPUT, {"target": str(verdicts)})


def _near_schema() -> pa.Schema:
    return pa.schema([("node", pa.int64()), ("other", pa.int64()), ("similarity", pa.float64())])


def _near(database: duckdb.DuckDBPyConnection, scratch: Path, threshold: float) -> Iterator[pa.RecordBatch]:
    """Each text that is near a preferred one that stays, with the most preferred of these."""
    ((count,),) = database.execute("select count(*) from nodes").fetchall()
    gone = np.zeros(count, np.bool_)
    with PayloadFile(scratch / "payload", count) as payloads:
        for batch in database.sql(_PAYLOADS).to_arrow_reader(_BATCH):
            payloads.add(batch)
        for batch in database.sql("select node, other from pairs order by node, other").to_arrow_reader(_BATCH):
            rows = []
            # All pairs of what is preferred come before, so it's known whether `other` stays.
            for node, other in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
                if gone[node] or gone[other]:
                    continue
                similarity = _similarity(payloads[node], payloads[other], threshold)
                if similarity is not None:
                    gone[node] = True
                    rows.append({"node": node, "other": other, "similarity": similarity})
            yield pa.RecordBatch.from_pylist(rows, schema=_near_schema())


def _similarity(one: Payload, other: Payload, threshold: float) -> float | None:
    """Their similarity by the shingles themselves; None if it is too low, or they are two problems by their words."""
    similarity = jaccard(one.shingles, other.shingles)
    if similarity < threshold:
        return None
    if one.text and other.text and not same_problem(one.text.split(" "), other.text.split(" ")):
        return None
    return similarity
