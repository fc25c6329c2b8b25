"""Preparing beside `datasets.map`: the same rows rendered and tokenised by as many processes, side by side in one run.

python kernels/benchmarks/data_prepare.py [--tokenizer FOLDER] [--rows 20000] [--workers 2]

Both read the same jsonl, render with the same chat template, tokenise, and write every row with its ids and the mask of
what is trained. Runs alternate; the ratio is that of the medians. Each run starts its own processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

# Before any import that reads it; the processes of both sides inherit it.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from sft.data.engine.accounts import funnel_entries
from sft.data.engine.builder import Builder
from sft.data.engine.local import LocalEngine
from sft.data.engine.plan import make_plan
from sft.data.prepare import saved_tokenizer
from sft.data.tokenize.template import training_template
from sft.data.tokenize.tokens import tokenizer_hash
from sft.recipe.schema import DataSection

TEXT = "so the sum of both is then we add subtract multiply by 12 47 x y = + ( ) hence wait let me check that again"
WORDS = TEXT.split()


def make_rows(path: Path, rows: int, seed: int = 0) -> None:
    """Problems with traces of 100 to 1,500 words."""
    chance = random.Random(seed)
    with path.open("w", encoding="utf-8") as handle:
        for number in range(rows):
            words = " ".join(chance.choices(WORDS, k=chance.randint(100, 1500)))
            row = {"question": f"Problem {number}: {' '.join(chance.choices(WORDS, k=30))}?", "answer": words}
            handle.write(json.dumps(row) + "\n")


def ours(source: Path, tokenizer: Any, workers: int, folder: Path) -> tuple[float, int]:
    """(seconds, tokens) of the engine: read, render and tokenise shard by shard."""
    section = {"path": str(source), "columns": {"prompt": "question", "completion": "answer"}, "steps": ["render"]}
    data = DataSection.model_validate({"sources": [section]})
    started = time.perf_counter()
    digest = tokenizer_hash(tokenizer, training_template(tokenizer))
    ends = make_plan(data, digest, None)
    with LocalEngine(workers) as engine:
        passes = Builder(folder, engine, saved_tokenizer(folder, tokenizer, digest), 0).build(ends)
    return time.perf_counter() - started, funnel_entries(passes)[-1]["kept"]["tokens"]


def theirs(source: Path, tokenizer_path: str, workers: int, folder: Path) -> tuple[float, int]:
    """(seconds, tokens) of datasets: load, map in batches over processes, written to its cache."""
    import datasets

    datasets.disable_progress_bars()
    started = time.perf_counter()
    data = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(folder))
    mapped = data.map(
        Render(tokenizer_path), batched=True, batch_size=256, num_proc=workers, load_from_cache_file=False
    )
    seconds = time.perf_counter() - started
    return seconds, sum(len(ids) for ids in mapped.with_format("numpy")["input_ids"])


class Render:
    """The same work as a batch function, as transformers does it: the tokens, and which of them are the assistant's."""

    def __init__(self, tokenizer_path: str) -> None:
        self.path = tokenizer_path
        self.tokenizer: Any = None

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        if self.tokenizer is None:
            from transformers import PreTrainedTokenizerFast

            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(self.path)
        conversations = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer in zip(batch["question"], batch["answer"], strict=True)
        ]
        found = self.tokenizer.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {name: found[name] for name in ("input_ids", "assistant_masks")}


def main() -> None:
    """Print seconds, tokens per second and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer", help="folder of a fast tokenizer with a chat template (default: the built-in one)"
    )
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    from sft.tokenizers.load import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer or "tiny")
    times: dict[str, list[float]] = {"sambay-sft": [], "datasets.map": []}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        source, saved = root / "rows.jsonl", root / "tokenizer"
        make_rows(source, arguments.rows)
        tokenizer.chat_template = training_template(tokenizer)  # marks what the assistant says
        tokenizer.save_pretrained(saved)
        for _ in range(arguments.runs):
            first = ours(source, tokenizer, arguments.workers, root / "ours")
            second = theirs(source, str(saved), arguments.workers, root / "theirs")
            if first[1] != second[1]:
                raise SystemExit(f"not the same work: {first[1]} and {second[1]} tokens")
            for label, (seconds, tokens) in zip(times, (first, second), strict=True):
                times[label].append(seconds)
                print(f"{label:14} {seconds:7.1f} s  {tokens / seconds:12,.0f} tokens/s", flush=True)
            shutil.rmtree(root / "ours")
            shutil.rmtree(root / "theirs")
    ratio = statistics.median(times["datasets.map"]) / statistics.median(times["sambay-sft"])
    print(f"render and tokenise, {arguments.workers} processes: {ratio:.2f} times datasets.map")


if __name__ == "__main__":
    main()
