"""Batched decoding for any causal language model with a transformers cache, hybrid state-space models included."""

from sft.generate.engine import Generation, end_token_ids, generate_batch

__all__ = ["Generation", "end_token_ids", "generate_batch"]
