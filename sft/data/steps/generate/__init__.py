"""The step `generate`: answers from language models, asked, journaled, counted."""
