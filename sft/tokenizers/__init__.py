"""Tokenizers: loading them as tokenizer.json says, and the built-in tiny one."""
