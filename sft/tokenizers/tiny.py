"""The built-in tokenizer of the tiny recipe: whole words and single digits for generated problems, bytes for the rest.

Called `tiny` in a recipe. It needs no download and encodes any text without loss.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<|pad|>")
"""Special tokens, named as in the Phi-4-mini tokenizer (which pads with its end of text; here padding has its own)."""
THINK_TOKENS = ("<think>", "</think>", "\\boxed{")
"""Tokens of their own, but not special: decoding with `skip_special_tokens=True` keeps them."""

# A word takes the spaces around it, an operator too, so that a space is never a token of its own. Digits and unknowns
# stay single; the mark of a step or a round is one token, the same in the question and in its solution, so that it can
# be looked up.
PATTERN = r" \([0-9]+\)| \[[0-9]+\]| ?\b[a-m]\b| [-+*/=] | last|[0-9]| ?[A-Za-z]+ ?|[.:?] ?|\n"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A new tokenizer: every piece of generated problems is one token, any other text falls back to bytes.

    Its chat template is the published Phi-4-mini one; padding is on the left, for generation.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from sft.tokenizers.templates import PUBLISHED_TEMPLATE

    # ignore_merges makes a piece that stands in the vocabulary one token; there are no merges, so others become bytes.
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(), merges=[], ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CHAT_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        padding_side="left",
        chat_template=PUBLISHED_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@cache
def words() -> tuple[str, ...]:
    """Every piece that generated problems are made of, sorted. A test generates some and finds no other piece."""
    return tuple(json.loads(Path(__file__).with_name("tiny_words.json").read_text(encoding="utf-8")))


def _vocabulary() -> dict[str, int]:
    """256 bytes, then the words, in the byte-level alphabet of BPE."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    encoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for word in words():
        symbols = "".join(piece for piece, _ in encoder.pre_tokenize_str(word))
        vocabulary.setdefault(symbols, len(vocabulary))
    return vocabulary
