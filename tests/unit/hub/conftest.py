"""A test Hub, a tiny SambaY with a tokenizer and a template, and exports of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, running_hub

from sft.hub.folder import KIND, MANIFEST, describe_files
from sft.utils.files import write_json

# The published template with generation marks, as the training template of sft.data has it.
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with running_hub(tmp_path / "hub") as server:
        yield server


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token of this machine takes part in a test."""
    import huggingface_hub.constants as constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))


@pytest.fixture
def seal() -> Callable[..., None]:
    """Write the manifest of a fake export over what the folder holds now."""
    return _seal


@pytest.fixture
def fake_export(tmp_path: Path) -> Path:
    """A folder that looks like an export with two weight files: enough for everything but loading."""
    folder = tmp_path / "export"
    folder.mkdir()
    for number in (1, 2, 3):
        (folder / f"model-0000{number}-of-00003.safetensors").write_bytes(os.urandom(20_000 * number))
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A model\n")
    (folder / "tokenizer.json").write_text("{}")
    _seal(folder)
    return folder


def _seal(folder: Path, **facts: Any) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)
    write_json(folder / MANIFEST, {"kind": KIND, "adapter_base": None, **facts, "files": describe_files(folder)})


def _tiny_tokenizer() -> Any:
    """A byte-level tokenizer of 266 tokens with the chat tokens of Phi-4-mini."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *letters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _tiny_sambay(dtype: str = "float32", seed: int = 0) -> Any:
    import torch

    from sft.models import Phi4FlashConfig, Phi4FlashForCausalLM

    config = Phi4FlashConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    return Phi4FlashForCausalLM._from_config(config, dtype=getattr(torch, dtype)).eval()


@pytest.fixture(scope="session")
def tiny_sambay() -> Callable[..., Any]:
    """Makes an 8-layer SambaY with random weights: tiny_sambay(dtype="float32", seed=0)."""
    return _tiny_sambay


@pytest.fixture(scope="session")
def sambay() -> tuple[Any, Any]:
    """A tiny SambaY in float32 and its tokenizer."""
    return _tiny_sambay(), _tiny_tokenizer()


@pytest.fixture(scope="session")
def sambay_export(sambay: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SambaY, exported in several shards."""
    from sft.hub.export import export

    return export(sambay, tmp_path_factory.mktemp("exported") / "tiny-sambay", max_shard_size="200KB", check=False)
