"""DuckDB's part of the steps that decide on all rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft.data.steps.sql import connect
from sft.data.steps.tables import batches, write_parquet
from sft.utils.errors import UserError


def test_batches_keep_the_order_and_leave_no_file(tmp_path: Path) -> None:
    with connect(tmp_path) as db:
        query = "SELECT range AS n, [range] AS list FROM range(100000) ORDER BY hash(range)"
        wanted = db.execute(query).fetchall()
        found = list(batches(db, query, tmp_path / "rows.parquet", 30_000))
    assert [len(batch) for batch in found] == [30_000] * 3 + [10_000]
    assert [row for batch in found for row in batch] == wanted
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with connect(tmp_path) as db:
        db.execute("SET memory_limit = '20MB'; SET max_temp_directory_size = '1MB'")
        with pytest.raises(UserError, match=r"no room to decide on all rows at once .*free some disk space"):
            write_parquet(db, "SELECT hash(range) AS n FROM range(5000000) ORDER BY n", tmp_path / "rows.parquet")
