"""The same recipe on a local Ray of two workers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SUPPORT = Path(__file__).resolve().parents[3] / "support"

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {support!r})
import prepare_victim
from data_toys import byte_tokenizer, stage_of
from sft.data.engine import builder
from sft.data.prepare import prepare_stage

builder.SHARD_ROWS = 40
for engine in ("local", "ray"):
    out = Path({folder!r}) / engine
    data = {{"steps": prepare_victim.STEPS}}
    train = {{"max_length": 1024, "packing": True, "dataset_num_proc": 1 if engine == "local" else 2}}
    recipe = stage_of([{{"path": {source!r}, "columns": {{"prompt": "q", "completion": "a"}}}}], out, train, data)
    done = prepare_stage(recipe, recipe.stages[0], byte_tokenizer(), engine=engine)
    funnel = str(done.manifest["funnel"]).replace(" ", "")
    print(engine, len(done.dataset), funnel, prepare_victim.hashes(out))
"""


@pytest.mark.slow
def test_ray_makes_the_same_rows(tmp_path: Path, write_rows: Any) -> None:
    pytest.importorskip("ray", reason="Ray isn't installed (extra `ray`)")
    rows = [{"q": f"What is {n} plus 1? " + "Think. " * (n % 13), "a": f"It is {n}."} for n in range(200)]
    script = SCRIPT.format(support=str(SUPPORT), folder=str(tmp_path), source=str(write_rows(rows)))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    local, ray = (line.split() for line in done.stdout.splitlines() if line.startswith(("local", "ray")))
    assert local[1:] == ray[1:]
