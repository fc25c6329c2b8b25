"""The tokenizer is that of tokenizer.json, before and after it is saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from sft.tokenizers.load import load_tokenizer

TEXTS = ["<think>\n12345 + 678\n</think>\n\nSo.\nIt's $x^2$.\n\n", "naïve cafés, ЖЖ, 日本語\r\n\t  done ", "a>\n\nb"]


@pytest.fixture(scope="module")
def published(shared_dir: Path) -> Path:
    return shared_dir / "models" / "Phi-4-mini-flash-reasoning"


def texts(shared_dir: Path) -> list[str]:
    lines = (shared_dir / "data/gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    return [*TEXTS, *(f"<think>\n{row['answer']}\n</think>\n\n{row['question']}" for row in map(json.loads, lines))]


def test_ids_are_those_of_the_published_file(published: Path, shared_dir: Path) -> None:
    truth, tokenizer = Tokenizer.from_file(str(published / "tokenizer.json")), load_tokenizer(str(published))
    for text in texts(shared_dir):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == truth.encode(text).ids
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"


def test_what_is_saved_loads_the_same_for_us_and_for_anyone(published: Path, shared_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(str(published))
    tokenizer.save_pretrained(tmp_path)
    for again in (load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)):
        for text in texts(shared_dir):
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
