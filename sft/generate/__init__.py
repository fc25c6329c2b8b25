"""Batched decoding for any causal language model with a transformers cache, hybrid state-space models included."""

from sft.generate.engine import generate_batch
from sft.generate.requests import Generation

__all__ = ["Generation", "generate_batch"]
