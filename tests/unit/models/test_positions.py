"""Rows beyond the positions that a model has learned are told of in a sentence, not by an IndexError."""

from __future__ import annotations

import pytest
import torch
from tiny_sambay import tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from sft.models.positions import check_positions, learned_positions
from sft.utils.errors import UserError

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_learned_positions_and_none_beyond() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    opt = OPTForCausalLM(OPTConfig(**SMALL, max_position_embeddings=32, ffn_dim=16, word_embed_proj_dim=16))
    for model in (gpt2, opt):
        assert learned_positions(model) == 32
        check_positions(model, 32)
        model(input_ids=torch.zeros(1, 32, dtype=torch.long))
        with pytest.raises(IndexError):
            model(input_ids=torch.zeros(1, 33, dtype=torch.long))
        with pytest.raises(UserError, match=r"has 33 tokens, .*learned 32 positions .*max_length to 32 or"):
            check_positions(model, 33)


def test_rotary_models_and_sambay_know_any_position() -> None:
    llama = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=16, max_position_embeddings=32))
    for model in (llama, tiny_model()):
        assert learned_positions(model) is None
        check_positions(model, 10**6)
