"""Where an answer ends."""

from __future__ import annotations

from typing import Any

from sft.tokenizers.turns import end_of_turn

# What ends a turn in the chat formats of Phi, ChatML and Llama 3.
_TURN_ENDS = ("<|end|>", "<|im_end|>", "<|eot_id|>")


def end_token_ids(tokenizer: Any, model: Any = None) -> list[int]:
    """Every id that ends an answer, each once: end of turn (by name, and as the chat template says it), the tokenizer's
    end of text, the model's own end tokens.

    Args:
        model: its generation configuration is read; None: there is no model yet, or its configuration is to be made.
    """
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token] for token in _TURN_ENDS if token in vocabulary]
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for value in (end_of_turn(tokenizer), tokenizer.eos_token_id, configured):
        ids += value if isinstance(value, list | tuple) else [] if value is None else [value]
    return list(dict.fromkeys(ids))
