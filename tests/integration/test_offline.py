"""A whole run in a network namespace that holds nothing but its own loopback, which two processes meet on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = """
name: offline
output_dir: {root}/run
model:
  config: {{hidden_size: 32, intermediate_size: 48, num_hidden_layers: 4, num_attention_heads: 4,
           num_key_value_heads: 2, sliding_window: 16}}
  tokenizer: tiny
stages:
  - name: s0
    data: {{sources: [{{path: {root}/rows.jsonl}}]}}
    train: {{max_length: 96, max_steps: 2, per_device_train_batch_size: 1, learning_rate: 1.0e-3, bf16: false}}
    evaluate:
      before_first_stage: false
      suites: [{{name: sums, source: {{path: {root}/rows.jsonl}}, max_new_tokens: 4}}]
"""
NOBODY = "import socket; socket.create_connection(('1.1.1.1', 53), 3)"


@pytest.mark.slow
def test_a_run_needs_no_network(tmp_path: Path) -> None:
    inside = ["unshare", "--user", "--map-root-user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*inside, "true"], capture_output=True, timeout=30).returncode:
        pytest.skip("this machine allows no network namespaces")
    rows = [{"prompt": f"{n}+1=", "completion": f"The answer is {n + 1}.", "answer": f"{n + 1}"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.yaml").write_text(RECIPE.format(root=tmp_path))
    run = f"{sys.executable} -m sft run {tmp_path}/r.yaml --num_processes 2"
    commands = f'ip link set lo up || exit 9; {sys.executable} -c "{NOBODY}" 2>/dev/null && exit 8; {run}'
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**kept, "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*inside, "bash", "-c", commands], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    stage = manifest.get("content", manifest)["stages"]["s0"]
    assert (stage["steps"], stage["world_size"]) == (2, 2)
    assert (tmp_path / "run/report/index.html").is_file() and (tmp_path / "run/export/config.json").is_file()
