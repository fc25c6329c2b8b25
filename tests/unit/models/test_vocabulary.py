"""Ids beyond a model's vocabulary are told in a sentence, wherever they would be looked up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sft.recipe.schema import ModelSection
from sft.tokenizers.vocabulary import check_vocabulary, vocabulary_size
from sft.utils.errors import UserError


class Toy(torch.nn.Module):
    """A model with embeddings for ten ids."""

    def get_input_embeddings(self) -> torch.nn.Module:
        return torch.nn.Embedding(10, 2)


def test_the_largest_id_has_an_embedding() -> None:
    check_vocabulary(Toy(), 9)
    with pytest.raises(
        UserError, match=r"makes token 10, but the model's vocabulary ends at 9: .* check model.tokenizer"
    ):
        check_vocabulary(Toy(), 10)


@pytest.mark.parametrize(
    ("config", "size"),
    [({"vocab_size": 7}, 7), ({"text_config": {"vocab_size": 8}, "vocab_size": 9}, 8), ({}, None), ([], None)],
)
def test_the_size_is_the_configurations(tmp_path: Path, config: object, size: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert vocabulary_size(ModelSection(model_name_or_path=str(tmp_path))) == size


def test_no_configuration_says_none(tmp_path: Path) -> None:
    assert vocabulary_size(ModelSection(model_name_or_path=str(tmp_path))) is None
    assert vocabulary_size(ModelSection(config={}, tokenizer="tiny")) is None
    assert vocabulary_size(ModelSection(config={"vocab_size": 5}, tokenizer="tiny")) == 5
