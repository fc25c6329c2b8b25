"""Whether a model and a tokenizer can be written at all, found out before anything is trained or merged."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

from sft.models.merge import base_of
from sft.utils.errors import UserError, first_line


def check_savable(model: Any, tokenizer: Any, say: Callable[[str], None]) -> None:
    """Save configurations and tokenizer into a scratch folder; put the most common obstacle right, and say so.

    Generation settings for sampling (a temperature, say) without `do_sample` are loaded by transformers, but not saved:
    they are kept, and `do_sample` is switched on, without which they would mean nothing.

    Args:
        tokenizer: None: there is none. say: called with one line of text where something is changed.
    Raises:
        UserError: naming what can't be saved, and why.
    """
    base = base_of(model)
    generation: Any = getattr(base, "generation_config", None)
    with tempfile.TemporaryDirectory(prefix="sft-save-") as scratch:
        refusal = _refusal(generation, scratch)
        if refusal and not generation.do_sample:
            generation.do_sample = True
            if _refusal(generation, scratch) is None:
                say(f"generation_config.json has settings for sampling without do_sample, now true ({refusal})")
            else:
                generation.do_sample = False
        parts = {"config.json": base.config, "generation_config.json": generation, "tokenizer": tokenizer}
        for name, part in parts.items():
            reason = _refusal(part, scratch)
            if reason:
                where = getattr(tokenizer if part is tokenizer else base.config, "name_or_path", "") or "the model"
                raise UserError(
                    f"the {name} of {where} can't be saved, and without it nothing that is trained can be: {reason}; "
                    "correct it there first"
                )


def _refusal(part: Any, folder: str) -> str | None:
    """Why `part` can't be saved; None: it can, or there is none."""
    from transformers import GenerationConfig

    try:
        if isinstance(part, GenerationConfig):
            # Saving is this strict only once the settings have changed, which training and export see to.
            part.validate(strict=True)
        if part is not None:
            part.save_pretrained(folder)
    except Exception as error:  # whatever a library raises here, it would raise at the first checkpoint
        lines = str(error).split("\n", 2)  # the first may be a mere title: "GenerationConfig is invalid: "
        return " ".join(lines[:2]) if lines[0].strip().endswith(":") else first_line(error)
    return None
