"""Batched decoding: SambaY models over slots of states, any other causal language model through its own cache."""

from sft.generate.engine import Engine, generate_batch
from sft.generate.requests import Generation, TokenLogprobs
from sft.generate.sampling import SamplingParams

__all__ = ["Engine", "Generation", "SamplingParams", "TokenLogprobs", "generate_batch"]
