"""The tensors of a SambaY checkpoint: their names and shapes, and what to say of a checkpoint that differs.

Needs nothing: no torch, no vLLM.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

SHOWN = 3  # names in a message


def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint and its shape: 434 for Phi-4-mini-flash-reasoning, whose head is tied.

    Args:
        config: a `sambay_vllm.configuration.Phi4FlashConfig`, or what has its attributes.
    """
    hidden, vocabulary = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{prefix}.{norm}.weight": (hidden,), f"{prefix}.{norm}.bias": (hidden,)}
        shapes[f"{prefix}.mlp.fc1.weight"] = (2 * config.intermediate_size, hidden)
        shapes[f"{prefix}.mlp.fc2.weight"] = (hidden, config.intermediate_size)
        mixer = _of_attention if layer % 2 else _of_memory_unit if layer > config.num_hidden_layers // 2 else _of_mamba
        shapes |= {f"{prefix}.attn.{name}": shape for name, shape in mixer(config, layer).items()}
    shapes |= {"model.final_layernorm.weight": (hidden,), "model.final_layernorm.bias": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def wrong_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> str | None:
    """One sentence where a tensor's shape isn't the one that config.json asks for, else None."""
    if shape == wanted:
        return None
    told = f"tensor {name} has shape {list(shape)}, and config.json asks for {list(wanted)}"
    return f"{told}: the weights and config.json aren't of the same model"


def left_over(names: Collection[str]) -> str | None:
    """One sentence where a checkpoint holds tensors that the model doesn't have, else None."""
    if not names:
        return None
    told = f"the checkpoint holds {_count(names)} that a SambaY model of this config.json doesn't have ({_some(names)})"
    if any("lora_" in name for name in names):
        return f"{told}: it is an adapter; merge it first (`sft export` does so by itself)"
    return f"{told}: it is of another model, or config.json is"


def missing(names: Collection[str]) -> str | None:
    """One sentence where tensors of the model are not in the checkpoint, else None."""
    if not names:
        return None
    return (
        f"the checkpoint lacks {_count(names)} ({_some(names)}): a weights file is missing; copy the whole folder again"
    )


def _count(names: Collection[str]) -> str:
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'}"


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:SHOWN]
    return ", ".join(shown) + (", ..." if len(names) > SHOWN else "")


def _of_mamba(config: Any, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, inner, states = config.hidden_size, config.mamba_expand * config.hidden_size, config.mamba_d_state
    return {
        "in_proj.weight": (2 * inner, hidden),
        "conv1d.weight": (inner, 1, config.mamba_d_conv),
        "conv1d.bias": (inner,),
        "x_proj.weight": (config.mamba_dt_rank + 2 * states, inner),
        "dt_proj.weight": (inner, config.mamba_dt_rank),
        "dt_proj.bias": (inner,),
        "A_log": (inner, states),
        "D": (inner,),
        "out_proj.weight": (hidden, inner),
    }


def _of_memory_unit(config: Any, layer: int) -> dict[str, tuple[int, ...]]:
    inner = config.mamba_expand * config.hidden_size
    return {"in_proj.weight": (inner, config.hidden_size), "out_proj.weight": (config.hidden_size, inner)}


def _of_attention(config: Any, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    cross = layer > config.num_hidden_layers // 2 + 1
    rows = hidden if cross else hidden + 2 * config.num_key_value_heads * head
    shapes: dict[str, tuple[int, ...]] = {"Wqkv.weight": (rows, hidden), "Wqkv.bias": (rows,)}
    shapes |= {"out_proj.weight": (hidden, hidden), "out_proj.bias": (hidden,)}
    shapes |= {f"inner_cross_attn.lambda_{name}": (head,) for name in ("q1", "k1", "q2", "k2")}
    return {**shapes, "inner_cross_attn.subln.weight": (2 * head,)}
