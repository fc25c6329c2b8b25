"""Sequence parallelism: ranks that share the tokens of a packed row (docs/sequence-parallelism.md)."""
