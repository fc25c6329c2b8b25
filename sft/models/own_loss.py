"""Whether a model's loss is ours to choose and to look into: told from its structure, before weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sft.models.load import structure
from sft.recipe.problems import KeyProblem

if TYPE_CHECKING:
    from sft.recipe.schema import Recipe, Stage

LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
"""Keys of configurations that change the logits behind the output projection."""


def loss_problems(recipe: Recipe, *, fetch: bool = True) -> Iterator[KeyProblem]:
    """Stages that ask what the own loss of the model the run starts from can't give, by their place in the recipe.

    What only running the model shows (sft.models.chunked_head) is told when the stage begins. Without `fetch` the Hub
    isn't asked.
    """
    section = recipe.model
    asked = [_asked(stage) for stage in recipe.stages]
    # A model from scratch is a SambaY; foreign code isn't run for its structure alone.
    if section.model_name_or_path is None or section.trust_remote_code or not any(asked):
        return
    why = own_loss(structure(section.model_name_or_path, revision=section.model_revision, fetch=fetch))
    for index, loc in enumerate(asked):
        if why and loc:
            limit = "its own loss is all that it can be trained with"
            if loc == ("stop_when",):
                limit = "its own loss is all that is known of it, not which tokens it predicts"
            yield KeyProblem(("stages", index, *loc), f"{why}, so {limit}: leave {loc[-1]} out", None)


def _asked(stage: Stage) -> tuple[str, ...]:
    """The key of a stage that needs a loss of ours; empty where none does."""
    if stage.train.loss.changes_loss():
        return ("train", "loss")
    if stage.train.distill is not None:
        return ("train", "distill")
    return ("stop_when",) if stage.stop_when is not None else ()


def own_loss(model: Any) -> str | None:
    """Why nothing can take the place of a model's own loss, as far as its structure tells; None where it may."""
    name, config, head = type(model).__name__, model.config, model.get_output_embeddings()
    if config.model_type == "phi4flash":
        return None
    if head is None or getattr(head, "bias", None) is not None:
        return f"{name} has no plain output projection"
    changed = next((key for key in LOGITS if getattr(config, key, None) not in (None, 1)), None)
    if changed:
        return f"{name} changes its logits ({changed})"
    return f"{name} adds a loss of its experts" if getattr(config, "output_router_logits", False) else None
