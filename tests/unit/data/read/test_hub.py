"""Data sets of the Hub, against a Hub server of ours, in a process of its own (the client reads its settings once)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, running_hub

from sft.data.read.hub import _sentence
from sft.recipe.schema import Source

SCRIPT = """
import json, os, sys
import pyarrow as pa, pyarrow.parquet as pq
from huggingface_hub import HfApi
from sft.data.read.sources import open_source
from sft.utils.errors import UserError
from sft.recipe.schema import Source

api, table = HfApi(), pa.Table.from_pylist([{"question": f"q{i}", "answer": f"a{i}"} for i in range(7)])
token = os.environ["TEST_TOKEN"]

def push(name, private):
    api.create_repo(name, repo_type="dataset", private=private, token=token)
    pq.write_table(table, "train.parquet")
    api.upload_file(path_or_fileobj="train.parquet", path_in_repo="data/train-00000-of-00001.parquet", repo_id=name,
                    repo_type="dataset", token=token)

push("tester/open", False)
push("tester/secret", True)
told = {}

def tell(name, **keys):
    try:
        opened = open_source(Source.model_validate(keys))
        told[name] = {"identity": opened.identity, "rows": [[r.source, r.line, r.value] for r in opened.read()]}
    except UserError as error:
        told[name] = str(error)

tell("open", path="tester/open")
tell("again", path="tester/open")
tell("first", path="tester/open", max_rows=2)
tell("missing", path="tester/nothing")
tell("private", path="tester/secret")
tell("split", path="tester/open", split="tset")
tell("config", path="tester/open", config="other")
tell("revision", path="tester/open", revision="v9")
table = table.slice(0, 3)
pq.write_table(table, "train.parquet")
api.upload_file(path_or_fileobj="train.parquet", path_in_repo="data/train-00000-of-00001.parquet",
                repo_id="tester/open", repo_type="dataset", token=token)
tell("changed", path="tester/open")
api.create_repo("tester/staged", repo_type="dataset", token=token)
for stage, rows in (("stage1-5", 5), ("stage2-2", 2)):
    text = json.dumps([{"question": f"{stage} {i}", "answer": "a"} for i in range(rows)])
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo=f"{stage}.json", repo_id="tester/staged",
                    repo_type="dataset", token=token)
tell("one file", path="tester/staged", data_files="*stage2*")
tell("other file", path="tester/staged", data_files="*stage1*")
os.environ["HF_TOKEN"] = token
tell("with token", path="tester/secret")
print("TOLD" + json.dumps(told))
"""


def _run(folder: Path, environment: dict[str, str], script: str) -> Any:
    theirs = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    ours = {"HF_HOME": str(folder / "hf"), "TEST_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    env = {**theirs, **ours, **environment}
    root = str(Path(__file__).resolve().parents[3])
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("TOLD")[1])


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What each source gave: rows and identity, or the error's sentence."""
    folder = tmp_path_factory.mktemp("hub")
    with running_hub(folder / "server") as server:
        yield _run(folder, {"HF_ENDPOINT": server.endpoint}, SCRIPT)


def test_rows_and_identity(told: dict[str, Any]) -> None:
    rows = told["open"]["rows"]
    assert rows[0] == ["tester/open:train", 1, {"question": "q0", "answer": "a0"}] and len(rows) == 7
    assert told["again"] == told["open"]
    assert told["first"]["rows"] == rows[:2]


def test_private_set_is_read_with_a_token(told: dict[str, Any]) -> None:
    assert len(told["with token"]["rows"]) == 7


def test_one_file_of_a_set(told: dict[str, Any]) -> None:
    assert [row[2]["question"] for row in told["one file"]["rows"]] == ["stage2-2 0", "stage2-2 1"]
    assert len(told["other file"]["rows"]) == 5 and told["other file"]["identity"] != told["one file"]["identity"]


def test_new_commit_is_other_content(told: dict[str, Any]) -> None:
    assert len(told["changed"]["rows"]) == 3
    assert told["changed"]["identity"] != told["open"]["identity"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing", "no local path of that name, and the Hub has no such data set or it is private"),
        ("private", "set HF_TOKEN to a token that may read it"),
        ("split", "split tset"),
        ("config", "config other"),
        ("revision", "no such revision"),
    ],
)
def test_errors_are_one_sentence(told: dict[str, Any], name: str, said: str) -> None:
    assert isinstance(told[name], str), told[name]
    assert said in told[name] and "\n" not in told[name]


def test_no_network(tmp_path: Path) -> None:
    script = """
import json
from sft.data.read.sources import open_source
from sft.utils.errors import UserError
from sft.recipe.schema import Source
try:
    open_source(Source.model_validate({"path": "tester/open"}))
except UserError as error:
    print("TOLD" + json.dumps(str(error)))
"""
    sentence = _run(tmp_path, {"HF_HUB_OFFLINE": "1"}, script)
    assert "the Hub can't be reached" in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Couldn't reach 'a/b' on the Hub (LocalEntryNotFoundError)"), "can't be reached"),
        (RuntimeError("Dataset 'a/b' is a gated dataset on the Hub.\nVisit the page"), "ask for access"),
        (ValueError("bad column\nand more"), "can't be loaded (config None, split train): bad column"),
    ],
)
def test_other_refusals(error: Exception, said: str) -> None:
    sentence = _sentence(Source.model_validate({"path": "a/b"}), error)
    assert sentence.startswith("a/b: ") and said in sentence and "\n" not in sentence
