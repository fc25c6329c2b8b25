"""Students and teachers small enough to score with, and the brute-force way to what the step `score` finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_sambay import tiny_model

from sft.data.read.message import Message
from sft.tokenizers.load import load_tokenizer


def save_student(folder: Path, tokenizer: Any, model: torch.nn.Module | None = None, *, seed: int = 0) -> Path:
    """A checkpoint folder with its tokenizer; by default a random model, whose probabilities are all small."""
    if model is None:
        model = tiny_model(seed, vocab_size=(len(tokenizer) + 63) // 64 * 64)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def token_logprobs(model: Any, ids: list[int]) -> np.ndarray:
    """(n,): of each token, full float32 logits of this one document; 0 for the first."""
    tokens = torch.tensor(ids)
    with torch.no_grad():
        logprobs = model(input_ids=tokens[None], use_cache=False).logits[0].float().log_softmax(-1)
    scores = logprobs[torch.arange(len(ids) - 1), tokens[1:]]
    return np.concatenate([[0.0], scores.double().numpy()])


def answer_logprobs(model: Any, tokenizer: Any, messages: list[Message]) -> list[tuple[int, int, float]]:
    """(start, end, log probability) of each token of the last message, found by its place in the rendered text."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    content = messages[-1]["content"]
    begin = text.rindex(content)
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    scores = token_logprobs(model, encoding.ids)
    found = []
    for (start, end), score in zip(encoding.offsets, scores, strict=True):
        if begin <= start < begin + len(content):
            found.append((start - begin, end - begin, float(score)))
    return found


def sentence_probability(text: str, sentence: tuple[int, int], tokens: list[tuple[int, int, float]]) -> float | None:
    """Geometric mean over the tokens whose first character that is no space lies in the sentence."""
    inside = []
    for start, end, score in tokens:
        blank = len(text[start:end]) - len(text[start:end].lstrip())
        first = start + blank if blank < end - start else start
        if sentence[0] <= first < sentence[1]:
            inside.append(score)
    return float(np.prod(np.exp(inside)) ** (1 / len(inside))) if inside else None


def tiny_tokenizer() -> Any:
    """The built-in tokenizer: words of the generated problems, bytes for the rest."""
    return load_tokenizer("tiny")
