"""Answers from language models behind OpenAI-compatible endpoints: asked, journaled, counted."""
