"""Ids by the dictionary of words against the library's own, on all of ASCII and for every build of tokenizer."""

from __future__ import annotations

import random
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sft.tokenizers.ascii_words import CLASSES, GPT2, ascii_words, translated

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
ADDED = [
    AddedToken("<|user|>", special=True, rstrip=True),
    AddedToken("<|end|>", special=True),
    AddedToken("<|end|><|end|>", special=False),
    AddedToken("[MASK]", special=True, lstrip=True),
    AddedToken("end|><", special=False, normalized=False),
]


def tokenizer(pattern: str | None, **changes: Any) -> Tokenizer:
    """A byte-level BPE of 400 tokens that splits by a pattern; None: as GPT-2 does."""
    made = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    steps = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level]) if steps else byte_level
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the answer isn't I'LL 12345  theirs\n\n    x = y" * 9, "Then they're there "], trainer)
    made.add_tokens(ADDED)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


BUILDS = {"o200k": O200K, "llama3": LLAMA3, "qwen": QWEN, "gpt2": None}
PIECES = ["  ", "\n", "\r\n", "'s", "'LL", "I'M", "the", "The", " 123", "</", "\t "]
PIECES += [token.content for token in ADDED]


@pytest.mark.parametrize("build", BUILDS)
def test_ids_are_the_librarys(build: str) -> None:
    made = tokenizer(BUILDS[build])
    words = ascii_words(made)
    assert words is not None
    draw, own = random.Random(0), 0
    for _ in range(3000):
        parts = [draw.choice([chr(draw.randrange(128)), draw.choice(PIECES)]) for _ in range(draw.randrange(30))]
        found = words.encode("".join(parts))
        own += found is not None
        assert found in (None, made.encode("".join(parts), add_special_tokens=False).ids), parts
    assert own > 1000  # the others have a space that an added token swallows


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_is_told_right_or_left_to_the_library(text: str) -> None:
    made, words = KNOWN
    assert words is not None and words.encode(text) in (None, made.encode(text, add_special_tokens=False).ids)


KNOWN = (tokenizer(O200K), ascii_words(tokenizer(O200K)))


def test_the_real_tokenizer(shared_dir: Path) -> None:
    real = Tokenizer.from_file(str(shared_dir / "models/Phi-4-mini-flash-reasoning/tokenizer.json"))
    words = ascii_words(real)
    assert words is not None
    text = "<|user|>What's 12345 - 7?\n\nThink.<|end|><|assistant|><think>\nIt's  $12{,}338$.\n</think>"
    plain = text.replace("<|user|>", "").replace("<|end|>", "").replace("<|assistant|>", "")
    for one in (text, plain, plain * 20):
        assert words.encode(one) in (None, real.encode(one, add_special_tokens=False).ids)
    assert words.encode(plain) is not None


def test_classes_are_unicodes() -> None:
    for name, members in CLASSES.items():
        found = translated(rf"\p{{{name}}}")
        assert found == f"[{members}]"
        for code in range(128):
            inside = unicodedata.category(chr(code)).startswith(name)
            assert bool(re.fullmatch(found, chr(code), re.ASCII)) == inside, (name, code)


@pytest.mark.parametrize("pattern", [
    r"\p{Greek}+", r"\P{L}+", r"(a)|b", r"a++b", r"a*?b", r"a{1,2}+", r".", r"^a", r"a$", r"[a[bc]]", r"[a-z&&b]",
    r"\h", r"\p{L", r"a{1}{2}", r"(?<=a)b", r"(?>a)",
])  # fmt: skip
def test_what_is_not_known_to_mean_the_same_is_left_to_the_library(pattern: str) -> None:
    assert translated(pattern) is None
    assert translated(GPT2) is not None


@pytest.mark.parametrize("changes", [
    {"normalizer": normalizers.NFC()},
    {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    {"pre_tokenizer": pre_tokenizers.Whitespace()},
    {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\s+"), "removed"), BYTE_LEVEL])},
    {"pre_tokenizer": None},
    {"model": models.BPE(dropout=0.1)},
    {"model": models.WordLevel({"a": 0}, "a")},
])  # fmt: skip
def test_other_builds_are_left_to_the_library(changes: dict[str, Any]) -> None:
    made = tokenizer(LLAMA3)
    for name, value in changes.items():
        setattr(made, name, value)
    assert ascii_words(made) is None


def test_a_word_that_has_to_stand_alone_is_left_to_the_library() -> None:
    made = tokenizer(LLAMA3)
    made.add_tokens([AddedToken("word", single_word=True)])
    assert ascii_words(made) is None
