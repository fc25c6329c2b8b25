"""Which models can share a packed row between processes, and what a token of theirs costs: from the structure alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft.models.load import structure
from sft.recipe.problems import KeyProblem

if TYPE_CHECKING:
    from sft.recipe.schema import Recipe


@dataclass(frozen=True)
class TokenCosts:
    """Multiply-adds of a token: of the self-decoder (with its windows full), of the cross-decoder, there for each key
    it sees, and of the head."""

    self_decoder: float
    cross_decoder: float
    key: float
    head: float

    @classmethod
    def of(cls, model: Any) -> TokenCosts | None:
        """Those of a model that can share rows, from its matrices and keys; None for one that can't."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = base.config
        if config.model_type != "phi4flash":
            return None
        width, inner, pair = config.hidden_size, config.mamba_d_inner, 2 * config.num_key_value_heads * config.head_dim
        mlp, attention = 3 * width * config.intermediate_size, 2 * width * width
        mamba = 3 * width * inner + inner * 2 * (int(config.mamba_dt_rank) + config.mamba_d_state)
        # Two maps of scores, and two values for each: three products of a head's width.
        key = 3 * width
        below = cross = full = 0
        for layer in range(config.num_hidden_layers):
            is_mamba, window = config.is_mamba(layer), config.window(layer)
            if layer < config.shared_kv_layer:
                below += mlp + (mamba if is_mamba else attention + width * pair + key * (window or 0))
            else:  # of the shared layer all but its keys and values, too
                cross += mlp + (2 * width * inner if is_mamba else attention)
                full += 0 if is_mamba else key
        return cls(below + width * pair, cross, full, width * config.vocab_size)


def sharing_problems(recipe: Recipe, *, fetch: bool = True) -> Iterator[KeyProblem]:
    """Stages that ask processes to share the rows of a model that can't. Without `fetch` the Hub isn't asked."""
    section = recipe.model
    asked = [index for index, stage in enumerate(recipe.stages) if stage.train.sequence_parallel_size > 1]
    # A model from scratch is a SambaY; foreign code isn't run for its structure alone.
    if section.model_name_or_path is None or section.trust_remote_code or not asked:
        return
    model = structure(section.model_name_or_path, revision=section.model_revision, fetch=fetch)
    if TokenCosts.of(model) is None:
        for index in asked:
            yield KeyProblem(("stages", index, "train", "sequence_parallel_size"), cant_share(model), None)


def cant_share(model: Any) -> str:
    """Why a stage of this model has to leave `sequence_parallel_size` out."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return f"{type(base).__name__} can't share a row between processes, which only SambaY models can: leave it out"
