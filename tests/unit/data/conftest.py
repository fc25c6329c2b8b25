"""A byte-level tokenizer with Phi-4-mini's chat tokens, the real one, and recipes over rows written on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from data_toys import byte_tokenizer, stage_of
from teacher_server import TeacherServer, serving

from sft.data.prepare import PreparedStage, prepare_stage


@pytest.fixture(scope="session")
def toy() -> Any:
    """Every byte is a token; the chat tokens are single tokens and swallow the whitespace after them."""
    return byte_tokenizer()


@pytest.fixture(scope="module")
def phi(shared_dir: Path) -> Any:
    """The published tokenizer."""
    from sft.tokenizers.load import load_tokenizer

    return load_tokenizer(str(shared_dir / "models" / "Phi-4-mini-flash-reasoning"))


@pytest.fixture(scope="session")
def gsm8k(shared_dir: Path) -> list[dict[str, str]]:
    """GSM8K's training rows."""
    lines = (shared_dir / "data" / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """write_rows(rows, name="rows.jsonl"): rows as JSON lines; a row that is a str or bytes is written as it is."""

    def write(rows: Iterable[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as handle:
            for row in rows:
                raw = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
                handle.write(raw + b"\n")
        return path

    return write


@pytest.fixture
def prepare(tmp_path: Path, toy: Any) -> Callable[..., PreparedStage]:
    """prepare(path or sources, train={...}, **data): prepare a stage of these with the toy tokenizer."""

    def run(
        sources: Any, *, train: dict[str, Any] | None = None, out: Path | None = None, progress: Any = None, **data: Any
    ) -> PreparedStage:
        listed = sources if isinstance(sources, list) else [{"path": str(sources)}]
        # One process: starting others takes seconds, and what they do is tested by itself.
        recipe = stage_of(listed, out or tmp_path / "out", {"dataset_num_proc": 1, **(train or {})}, data)
        return prepare_stage(recipe, recipe.stages[0], toy, progress=progress)

    return run


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[TeacherServer]:
    """A teacher that answers, with nothing of the environment in the way."""
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving() as running:
        yield running
