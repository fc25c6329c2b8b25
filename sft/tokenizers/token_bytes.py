"""The bytes that each token of a byte-level vocabulary spells: what makes tokens of two vocabularies the same."""

from __future__ import annotations

from typing import Any


def token_bytes(tokenizer: Any, *, added: bool = True) -> dict[int, bytes] | None:
    """Id -> bytes of a byte-level tokenizer's tokens; None for any other, whose tokens needn't spell the very text.

    `added`: with the added tokens (`<|end|>`), which spell their names.
    """
    backend = tokenizer.backend_tokenizer
    if b'"ByteLevel"' not in backend.decoder.__getstate__():
        return None
    byte_of = _byte_of_character()
    vocabulary = backend.get_vocab(with_added_tokens=False)
    named = {number: token.content.encode() for number, token in backend.get_added_tokens_decoder().items()}
    spelled = {
        number: bytes(byte_of[character] for character in token)
        for token, number in vocabulary.items()
        if number not in named
    }
    return {**spelled, **named} if added else spelled


def _byte_of_character() -> dict[str, int]:
    """What byte each character of a byte-level vocabulary stands for (Radford et al. 2019, GPT-2's encoder.py):
    printable ones for themselves, the others, in order, for 256 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
