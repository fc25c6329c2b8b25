"""Small SambaY exports for vLLM, and what our engine answers with them. Runs with this project's packages."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sft.generate import Engine, SamplingParams
from sft.hub.export import export
from sft.models import Phi4FlashConfig, Phi4FlashForCausalLM
from sft.tokenizers.tiny import build_tokenizer

TOP = 3  # log-probabilities compared, beside the chosen token's own


@dataclass(frozen=True)
class Shape:
    """A model's heads and width."""

    heads: int
    kv_heads: int
    hidden: int
    layers: int = 8
    window: int = 16


# Two, one, four and three queries to a key head; heads 16, 16, 32 and 8 wide; 4 and 12 layers among them.
SHAPES = {
    "two": Shape(8, 4, 128),
    "one": Shape(4, 4, 64, layers=4),
    "four": Shape(8, 2, 256, layers=12),
    "three": Shape(12, 4, 96),
}


def random_model(shape: Shape, vocabulary: int, end: int, seed: int) -> Any:
    """Weights larger than at initialisation, so that choices are clear ones; norms, biases and lambdas off neutral."""
    torch.manual_seed(seed)
    config = Phi4FlashConfig(
        vocab_size=vocabulary, hidden_size=shape.hidden, intermediate_size=2 * shape.hidden,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        sliding_window=shape.window, pad_token_id=end, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    model = Phi4FlashForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("A_log", "dt_proj.bias")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
        model.model.embed_tokens.weight.mul_(4.0)
    return model.eval()


def adapted(model: Any) -> Any:
    """The model with a random LoRA adapter on every projection; export merges it."""
    from peft import LoraConfig, get_peft_model

    from sft.models.load import lora_target_modules

    config = LoraConfig(r=4, lora_alpha=8, target_modules=lora_target_modules(model.config), task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return wrapped.eval()


def write(folder: Path, name: str, *, lora: bool = False, dtype: str = "float32") -> Path:
    """An export of the shape of that name, in `folder`."""
    tokenizer = build_tokenizer()
    model = random_model(SHAPES[name], len(tokenizer), tokenizer.eos_token_id, seed=len(name))
    source = (adapted(model) if lora else model, tokenizer)
    target = folder / f"{name}{'-lora' if lora else ''}-{dtype}"
    return export(source, target, check=False, dtype=dtype)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """An export as our engine takes it."""
    from transformers import AutoTokenizer

    model = Phi4FlashForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def prompts(count: int, longest: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Token ids, 1 to `longest` of them, both lengths included and the others evenly between."""
    draw = random.Random(seed)
    lengths = [1 + round(i * (longest - 1) / (count - 1)) for i in range(count)]
    draw.shuffle(lengths)
    return [[draw.randrange(vocabulary) for _ in range(length)] for length in lengths]


def answers(folder: Path, asked: Sequence[Sequence[int]], new: int) -> list[dict[str, Any]]:
    """Our engine's greedy answers: {"ids", "logprobs": [{"token", "top"}]}. No token ends one."""
    model, tokenizer = load(folder)
    engine = Engine(model, tokenizer, batch_size=16, eos_ids=())
    found = engine.generate(asked, SamplingParams(max_new_tokens=new, logprobs=TOP))
    return [{"ids": one.ids, "logprobs": [asdict(of_token) for of_token in one.logprobs or []]} for one in found]
