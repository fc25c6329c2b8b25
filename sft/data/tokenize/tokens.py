"""Rendered text to token ids and the mask of what is trained on.

Transformers' own `return_assistant_tokens_mask` is not used: it asks which token holds a span's first character, and
the chat tokens of Phi-4-mini swallow the whitespace after them (rstrip), so an answer that starts with a newline would
have `<|assistant|>` itself trained. Here a token is trained when its first character lies in a span. Where tokens begin
follows from their lengths where a byte-level tokenizer's ids spell the text, byte for byte; else the library tells it,
which takes it a quarter longer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers.decoders import ByteLevel

from sft.data.read.record import Tokens
from sft.data.tokenize.marks import Span
from sft.data.tokenize.render import Rendered
from sft.tokenizers.ascii_words import AsciiWords, ascii_words
from sft.utils.errors import UserError
from sft.utils.files import sha256_json

_PARALLEL = "TOKENIZERS_PARALLELISM"


class Owned(NamedTuple):
    """A document's tokens; the message (n,) that each is of, -1 where it isn't trained; whether these are all of
    them."""

    tokens: Tokens
    owners: NDArray[np.int64]
    whole: bool


def tokenize(tokenizer: Any, rendered: Sequence[Rendered], most: int | None = None) -> Iterator[Tokens]:
    """As `tokenize_owned`, the tokens alone."""
    return (found.tokens for found in tokenize_owned(tokenizer, rendered, most))


def tokenize_owned(tokenizer: Any, rendered: Sequence[Rendered], most: int | None = None) -> Iterator[Owned]:
    """Tokens of each rendered conversation, in order; the whole batch goes to the fast tokenizer at once.

    The first token of a document is never trained: nothing comes before it to predict it from.

    Args:
        most: a text that has more tokens than this by its length alone isn't read to its end: it gets more than `most`
            of its first tokens. So no row is too long to be told that it is. None: there is no limit.
    """
    if not rendered:
        return
    backend, lengths = _as_it_is(tokenizer), _byte_lengths(tokenizer, len(tokenizer))
    longest = most_characters(tokenizer, most)
    heads = [item.text[:longest] for item in rendered]
    for item, head, found in zip(rendered, heads, _ids(heads, tokenizer, backend), strict=True):
        whole = True
        if most is not None and len(head) < len(item.text):
            if len(found) <= most:  # of whitespace, say, that a token swallows
                (found,) = _ids([item.text], tokenizer, backend)
            else:
                item, whole = _beginning(item, len(head)), False
        ids = np.array(found, dtype=np.int32)
        first_from = _by_length(item.text, ids, lengths) or _by_offset(item.text, backend)
        mask = np.zeros(len(ids), dtype=np.uint8)
        for start, end in item.spans:
            mask[first_from(start) : first_from(end)] = 1
        mask[:1] = 0
        owners = np.full(len(ids), -1, dtype=np.int64)
        for number, (start, end) in item.owners:
            owners[first_from(start) : first_from(end)] = number
        yield Owned(Tokens(ids, mask), owners, whole)


def _beginning(item: Rendered, length: int) -> Rendered:
    """The first characters of a rendered conversation."""

    def cut(span: Span) -> Span:
        return span[0], min(span[1], length)

    owners = [(number, cut(span)) for number, span in item.owners if span[0] < length]
    return Rendered(item.text[:length], [cut(span) for span in item.spans if span[0] < length], owners)


def most_characters(tokenizer: Any, most: int | None) -> int | None:
    """How many characters of a text hold more than `most` tokens in any case; None where there is no limit."""
    return None if most is None else (most + 1) * _longest_token(tokenizer, len(tokenizer))


def _ids(texts: Sequence[str], tokenizer: Any, backend: Any) -> list[list[int]]:
    """Ids of each text: by the dictionary of words where it can, the others by the library, at once."""
    words = _words(tokenizer, len(tokenizer))
    found = [None if words is None else words.encode(text) for text in texts]
    with _one_thread():
        left = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        others = iter(backend.encode_batch_fast(left, add_special_tokens=False))
    return [next(others).ids if ids is None else ids for ids in found]


@lru_cache(maxsize=1)
def _words(tokenizer: Any, size: int) -> AsciiWords | None:
    """`size`: of the vocabulary, which tokens may be added to."""
    return ascii_words(_as_it_is(tokenizer))


_FirstFrom = Callable[[int], int]
"""Index of the first token that begins at a character or after it; the number of tokens where there is none."""


def _by_length(text: str, ids: NDArray[np.int32], lengths: NDArray[np.int64] | None) -> _FirstFrom | None:
    """From the tokens' lengths; None where the ids spell another text (some swallow the whitespace after them)."""
    if lengths is None:
        return None
    sizes = lengths[ids]
    if sizes.sum() != _bytes_in(text, len(text)):
        return None
    starts = np.cumsum(sizes) - sizes
    return lambda at: int(np.searchsorted(starts, _bytes_in(text, at)))


def _by_offset(text: str, backend: Any) -> _FirstFrom:
    """As the library tells it."""
    with _one_thread():
        encoding = backend.encode(text, add_special_tokens=False)
    return lambda at: _first_token_from(encoding, at, len(text), len(encoding))


@lru_cache(maxsize=1)
def _byte_lengths(tokenizer: Any, size: int) -> NDArray[np.int64] | None:
    """How many bytes each id (n,) spells; None for a tokenizer whose ids needn't spell the very text.

    `size`: of its vocabulary, which tokens may be added to.
    """
    backend = tokenizer.backend_tokenizer
    prefixed = backend.pre_tokenizer is not None and b'"add_prefix_space":true' in backend.pre_tokenizer.__getstate__()
    if not isinstance(backend.decoder, ByteLevel) or backend.normalizer is not None or prefixed:
        return None
    vocabulary = backend.get_vocab(with_added_tokens=False)
    added = backend.get_added_tokens_decoder()
    lengths = np.zeros(max([*vocabulary.values(), *added]) + 1, dtype=np.int64)
    for token, number in vocabulary.items():
        lengths[number] = len(token)  # a byte-level vocabulary writes each byte as one character
    for number, token in added.items():
        lengths[number] = len(token.content.encode())
    return lengths


@lru_cache(maxsize=1)
def _longest_token(tokenizer: Any, size: int) -> int:
    """Characters of the longest token; `size`: of its vocabulary, which tokens may be added to."""
    return max(map(len, tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)), default=1)


def _bytes_in(text: str, characters: int) -> int:
    """How many bytes the first characters of a text take."""
    return characters if text.isascii() else len(text[:characters].encode())


def _as_it_is(tokenizer: Any) -> Any:
    """The fast tokenizer, without the truncation, padding or escaping that an earlier caller may have left set."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    return backend


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the tokenizer from threads: processes share the work, and a forked one would wait for threads for ever.

    The variable is looked at anew in every call.
    """
    before = os.environ.get(_PARALLEL)
    os.environ[_PARALLEL] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLEL]
        else:
            os.environ[_PARALLEL] = before


def _first_token_from(encoding: Any, position: int, length: int, count: int) -> int:
    """Index of the first token whose first character is at `position` or after it; `count` where there is none."""
    for at in range(position, length):
        token = encoding.char_to_token(at)
        if token is not None:
            begins_before = encoding.token_to_chars(token)[0] < position
            return _after(encoding, token, count) if begins_before else int(token)
    return count


def _after(encoding: Any, token: int, count: int) -> int:
    """The first token after `token` that doesn't begin at the same character (a character may take several tokens)."""
    start = encoding.token_to_chars(token)[0]
    token += 1
    while token < count and (chars := encoding.token_to_chars(token)) is not None and chars[0] == start:
        token += 1
    return token


def check_tokenizer(tokenizer: Any) -> None:
    """Raise UserError for a tokenizer that can't tell which characters its tokens come from."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("The tokenizer is not a fast one (no tokenizer.json), so trained tokens can't be told apart.")


def tokenizer_hash(tokenizer: Any, template: str) -> str:
    """Hash of all that decides a conversation's tokens: vocabulary, merges, added tokens, rules, and the template."""
    backend = _as_it_is(tokenizer).to_str()
    return sha256_json({"backend": backend, "special": dict(tokenizer.special_tokens_map), "template": template})
