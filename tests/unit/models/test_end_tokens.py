"""Every source of end tokens counts, each id once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sft.models.end_tokens import end_token_ids
from sft.tokenizers.tiny import build_tokenizer


def tokenizer(eos: Any = 3, **vocabulary: int) -> Any:
    tokens = {"word": 9} | {f"<|{name}|>": number for name, number in vocabulary.items()}
    return SimpleNamespace(eos_token_id=eos, get_vocab=lambda: tokens)


def model(eos: Any) -> Any:
    return SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=eos))


@pytest.mark.parametrize("name", ["end", "im_end", "eot_id"])
def test_the_end_of_a_turn(name: str) -> None:
    assert end_token_ids(tokenizer(**{name: 5})) == [5, 3]
    assert end_token_ids(tokenizer(eos=5, **{name: 5})) == [5]


@pytest.mark.parametrize(("eos", "ids"), [(3, [3]), ([3, 4], [3, 4]), (None, [])])
def test_the_tokenizers_end_of_text(eos: Any, ids: list[int]) -> None:
    assert end_token_ids(tokenizer(eos)) == ids


@pytest.mark.parametrize(("eos", "ids"), [(11, [3, 11]), ([11, 3, 12], [3, 11, 12]), ((11,), [3, 11]), (None, [3])])
def test_the_models_generation_configuration(eos: Any, ids: list[int]) -> None:
    assert end_token_ids(tokenizer(), model(eos)) == ids
    assert end_token_ids(tokenizer(), SimpleNamespace()) == [3]


def test_all_of_them() -> None:
    assert end_token_ids(tokenizer(end=5, im_end=6, eot_id=7), model([7, 11])) == [5, 6, 7, 3, 11]


def test_a_real_tokenizer() -> None:
    real = build_tokenizer()
    assert end_token_ids(real) == [real.convert_tokens_to_ids("<|end|>"), real.eos_token_id]
