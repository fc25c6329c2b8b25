"""Greedy answers of vLLM are our engine's: every kind of head, chunks, prefixes, a merged adapter, two turns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compare import same_answers
from environment import run
from models import SHAPES, answers, load, prompts, write

from sft.generate import Engine, SamplingParams
from sft.tokenizers.prompt import prompt_text
from sft.tokenizers.tiny import build_tokenizer

ASK = str(Path(__file__).with_name("ask.py"))
VOCABULARY = len(build_tokenizer())
PLAIN = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 64}
Calls = Sequence[Sequence[Sequence[int]]]


class Job:
    """An export, calls of prompts, and what our engine answers; vLLM's answers come later."""

    def __init__(self, what: str, model: Path, calls: Calls, new: int, **options: Any) -> None:
        self.what, self.new, self.calls = what, new, calls
        self.told = {"model": str(model), "options": {**PLAIN, **options}, "prompts": calls, "new": new}
        self.model = model

    def wanted(self) -> list[dict[str, Any]]:
        """Our engine's answers, in float32."""
        return answers(self.model, [prompt for call in self.calls for prompt in call], self.new)


def ask(jobs: Sequence[Job], folder: Path, *, one_process: bool = True) -> list[dict[str, Any]]:
    """What `ask.py` has for each job."""
    (folder / "jobs.json").write_text(json.dumps([job.told for job in jobs]))
    files = [str(folder / name) for name in ("jobs.json", "found.json")]
    run([ASK, *files], folder, minutes=15 + 10 * len(jobs), one_process=one_process)
    found: list[dict[str, Any]] = json.loads((folder / "found.json").read_text())
    return found


def chunks(folder: Path) -> list[str]:
    """64 prompts of 1 to 700 tokens, all in flight together, read in pieces and whole; in vLLM's usual processes."""
    model, asked = write(folder, "two"), [prompts(64, 700, VOCABULARY)]
    pieces = {"max_num_batched_tokens": 256, "enable_prefix_caching": False}
    whole = {"max_num_batched_tokens": 8192, "enable_chunked_prefill": False, "enable_prefix_caching": False}
    jobs = [
        Job("prompts in pieces of 256", model, asked, 128, **pieces),
        Job("whole prompts", model, asked, 128, **whole),
    ]
    wanted, found = jobs[0].wanted(), ask(jobs, folder, one_process=False)
    return [same_answers(wanted, one["rows"], job.what) for job, one in zip(jobs, found, strict=True)]


def fast(folder: Path) -> list[str]:
    """Fast prefill: only tokens whose logits are wanted go through the cross-decoder, and the answers are the same."""
    model, asked, new = write(folder, "two"), [prompts(16, 400, VOCABULARY)], 24
    options = {"max_num_batched_tokens": 256, "enable_prefix_caching": False}
    usual = Job("usual prefill", model, asked, new, **options)
    short = Job("fast prefill", model, asked, new, kv_sharing_fast_prefill=True, **options)
    of_usual, of_short = ask([usual, short], folder)
    read, made = sum(map(len, asked[0])), len(asked[0]) * new
    assert of_usual["crossed"] >= read + made - len(asked[0])
    # A prompt's piece that isn't its last has one token whose logits are thrown away.
    assert of_short["crossed"] <= made + 2 * len(asked[0]) + read / 256, (of_short["crossed"], made)
    what = f"{short.what}, {of_short['crossed']} tokens in place of {of_usual['crossed']} through the cross-decoder"
    return [same_answers(short.wanted(), of_short["rows"], what)]


def heads(folder: Path) -> list[str]:
    """Every other count of heads, and a merged adapter."""
    jobs = []
    for name in [name for name in SHAPES if name != "two"]:
        asked = [prompts(16, 300, VOCABULARY, seed=len(name))]
        jobs.append(Job(f"heads {SHAPES[name].heads}/{SHAPES[name].kv_heads}", write(folder, name), asked, 64))
    jobs.append(Job("merged adapter", write(folder, "three", lora=True), jobs[-1].calls, 64))
    found = ask(jobs, folder)
    merged, plain = found[-1]["rows"], found[-2]["rows"]
    assert [one["ids"] for one in merged] != [one["ids"] for one in plain], "the adapter changes nothing"
    return [same_answers(job.wanted(), one["rows"], job.what) for job, one in zip(jobs, found, strict=True)]


def prefixes(folder: Path) -> list[str]:
    """Prompts that begin as earlier ones did, with prefix caching: what was read isn't read again, nor answered so."""
    model = write(folder, "two")
    first = prompts(4, 700, VOCABULARY, seed=3)
    second = [prompt + more for prompt in first for more in prompts(3, 200, VOCABULARY, seed=len(prompt))]
    job = Job("prompts with a known prefix", model, [first, second], 32, enable_prefix_caching=True)
    rows = ask([job], folder)[0]["rows"]
    cached = sum(row["cached"] for row in rows[len(first) :])
    assert cached > sum(len(prompt) for prompt in first), f"only {cached} tokens came from the cache"
    return [same_answers(job.wanted(), rows, f"{job.what}, {cached} tokens from the cache")]


def turns(folder: Path) -> list[str]:
    """A chat's second turn knows the first one."""
    export = write(folder, "two")
    model, tokenizer = load(export)
    engine, params = Engine(model, tokenizer, eos_ids=()), SamplingParams(max_new_tokens=40)
    questions = [f"Start with {7 * i + 11}. Add {i + 2}." for i in range(8)]
    chats: list[list[dict[str, str]]] = [[{"role": "user", "content": text}] for text in questions]
    first = [_ids(tokenizer, chat) for chat in chats]
    for chat, said in zip(chats, engine.generate(first, params), strict=True):
        chat.append({"role": "assistant", "content": tokenizer.decode(said.ids, skip_special_tokens=True)})
        chat.append({"role": "user", "content": "What was the first number?"})
    second = [_ids(tokenizer, chat) for chat in chats]
    job = Job("two turns", export, [first, second], 40)
    wanted = job.wanted()
    alone = answers(export, [_ids(tokenizer, chat[2:]) for chat in chats], 40)
    assert all(one["ids"] != other["ids"] for one, other in zip(wanted[8:], alone, strict=True))
    return [same_answers(wanted, ask([job], folder)[0]["rows"], job.what)]


def halves(folder: Path) -> list[str]:
    """bfloat16: an export in it, answered in it. The first token's log-probabilities are near those of float32."""
    model = write(folder, "two", dtype="bfloat16")
    asked = prompts(32, 300, VOCABULARY)
    job = Job("bfloat16", model, [asked], 1, dtype="bfloat16")
    rows = ask([job], folder)[0]["rows"]
    wanted = job.wanted()
    same = [one for one in zip(wanted, rows, strict=True) if one[0]["ids"] == one[1]["ids"]]
    apart = torch.tensor([abs(one["logprobs"][0]["token"] - other["logprobs"][0]["token"]) for one, other in same])
    assert len(same) >= 28 and apart.mean() < 0.1, (len(same), apart)
    return [f"bfloat16: {len(same)} of 32 first tokens equal, log-probabilities {apart.mean():.1e} apart on average"]


def _ids(tokenizer: Any, chat: Sequence[dict[str, str]]) -> list[int]:
    ids: list[int] = tokenizer(prompt_text(tokenizer, chat), add_special_tokens=False)["input_ids"]
    return ids
