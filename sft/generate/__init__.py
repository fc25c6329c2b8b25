"""Batched decoding for any causal language model with a transformers cache, hybrid state-space models included."""

from sft.generate.engine import Generation, generate_batch

__all__ = ["Generation", "generate_batch"]
