"""Names, shapes, dtypes and sizes of the published checkpoint, and the forms its configuration comes in."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny_sambay import tiny_config, tiny_model

from sft.models import Phi4FlashConfig, Phi4FlashForCausalLM


def published(shared_dir):
    folder = shared_dir / "models" / "Phi-4-mini-flash-reasoning"
    config = json.loads((folder / "config.json").read_text())
    return Phi4FlashConfig.from_dict(config), json.loads((folder / "model.safetensors.index.json").read_text())


@pytest.fixture(scope="module")
def full_size(shared_dir):
    config, index = published(shared_dir)
    with torch.device("meta"):
        return Phi4FlashForCausalLM._from_config(config, dtype=torch.bfloat16), index


def expected_shapes(layers=32, hidden=2560, inner=5120, middle=10240, head=64):
    """Written from the published description, layer by layer."""
    shapes = {
        "model.embed_tokens.weight": (200064, hidden),
        "model.final_layernorm.weight": (hidden,),
        "model.final_layernorm.bias": (hidden,),
    }
    for i in range(layers):
        p = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{p}{norm}.weight": (hidden,), f"{p}{norm}.bias": (hidden,)}
        shapes |= {p + "mlp.fc1.weight": (2 * middle, hidden), p + "mlp.fc2.weight": (hidden, middle)}
        a = p + "attn."
        if i % 2 == 0 and i <= 16:
            shapes |= {
                a + "in_proj.weight": (2 * inner, hidden),
                a + "conv1d.weight": (inner, 1, 4),
                a + "conv1d.bias": (inner,),
                a + "x_proj.weight": (192, inner),
                a + "dt_proj.weight": (inner, 160),
                a + "dt_proj.bias": (inner,),
                a + "A_log": (inner, 16),
                a + "D": (inner,),
                a + "out_proj.weight": (hidden, inner),
            }
        elif i % 2 == 0:
            shapes |= {a + "in_proj.weight": (inner, hidden), a + "out_proj.weight": (hidden, inner)}
        else:
            rows = hidden if i > 17 else 2 * hidden
            shapes |= {a + "Wqkv.weight": (rows, hidden), a + "Wqkv.bias": (rows,)}
            shapes |= {a + "out_proj.weight": (hidden, hidden), a + "out_proj.bias": (hidden,)}
            shapes |= {f"{a}inner_cross_attn.lambda_{x}": (head,) for x in ("q1", "k1", "q2", "k2")}
            shapes |= {a + "inner_cross_attn.subln.weight": (2 * head,)}
    return shapes


def test_names_shapes_and_count(full_size):
    model, index = full_size
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert len(index["weight_map"]) == 434
    assert set(found) == set(index["weight_map"])
    assert found == expected_shapes()
    assert sum(p.numel() for p in model.parameters()) == 3_852_562_944


def test_bytes_in_the_published_dtypes(full_size):
    model, index = full_size
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert all(name.endswith("A_log") or "lambda_" in name for name in kept)
    assert len(kept) == 9 + 16 * 4
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    assert total == 7_706_608_640 == index["metadata"]["total_size"]


def test_layer_roles_of_the_published_model(full_size):
    config = full_size[0].config
    windows = [config.window(i) for i in range(32)]
    assert windows == [512 if i < 16 and i % 2 else None for i in range(32)]
    assert (config.memory_layer, config.shared_kv_layer, config.mamba_dt_rank) == (16, 17, 160)


@pytest.mark.parametrize("form", ["int", "list", "layer_types", "round_trip"])
def test_every_form_of_the_configuration(form, tmp_path):
    types = ["sliding_attention" if i in (1, 3) else "full_attention" for i in range(8)]
    options = {
        "int": {"sliding_window": 24},
        "list": {"sliding_window": [24 if i in (1, 3) else None for i in range(8)]},
        "layer_types": {"sliding_window": 24, "layer_types": types},
        "round_trip": {"sliding_window": [24 if i in (1, 3) else None for i in range(8)]},
    }[form]
    config = tiny_config(**options)
    for _ in range(2 if form == "round_trip" else 0):
        config.save_pretrained(tmp_path)
        config = Phi4FlashConfig.from_pretrained(tmp_path)
    assert [config.window(i) for i in range(8)] == [None, 24, None, 24, None, None, None, None]
    assert config.sliding_window == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hidden_layers": 6}, "multiple of 4"),
        ({"mb_per_layer": 3}, "mb_per_layer"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "even"),
        ({"sliding_window": [24, 12]}, "one width"),
        ({"sliding_window": [None, 24]}, "too few"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"layer_types": ["sliding_attention"] * 8}, "can't be a window layer"),
    ],
)
def test_a_shape_that_is_no_sambay_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)


COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_dt_rank",
)  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_that_is_none_is_named(name):
    for value in (0, -4, 10**20, "8", "many", 8.0, float("nan"), float("inf"), None, True, [8], {"a": 8}):
        with pytest.raises(ValueError, match=rf"^{name} must be a whole number from 1 to 2147483647, not "):
            tiny_config(**{name: value})


@pytest.mark.parametrize("name", ["initializer_range", "layer_norm_eps"])
def test_a_measure_that_is_none_is_named(name):
    for value in (0, -0.1, "0.02", float("nan"), float("inf"), None, True, [0.02]):
        with pytest.raises(ValueError, match=rf"^{name} must be a number above 0, not "):
            tiny_config(**{name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("sliding_window", [0, 1, -24, "24", 24.0, True, None, [], [None] * 8, ["24"] * 8, {"a": 24}, 10**20]),
        ("layer_types", ["sliding_attention", 7, True, {"a": 1}, ["sliding"] * 8, [None] * 8, []]),
        ("pad_token_id", [-1, "0", 1.5, [0], True]),
        ("eos_token_id", [-1, "0", 1.5, [0, -1], ["0"], True]),
        ("bos_token_id", [-1, [0]]),
        ("mb_per_layer", [0, "2", None, [2]]),
        ("hidden_act", [None, 7, ["silu"]]),
    ],
)
def test_what_is_no_value_at_all_is_named(name, values):
    for value in values:
        if name == "layer_types" or value is not None or name in ("sliding_window", "mb_per_layer", "hidden_act"):
            with pytest.raises(ValueError, match=f"^{name}"):
                tiny_config(**{name: value})


def test_a_convolution_of_one_token_generates(tmp_path):
    model = tiny_model(mamba_d_conv=1, mamba_d_state=1, mamba_expand=1, mamba_dt_rank=1)
    ids = torch.randint(1, 96, (2, 9))
    asked = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **asked), model.generate(ids, use_cache=False, **asked))


def test_save_and_load_keep_the_published_dtypes(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].attn.A_log.fill_(0.123456789)
    model.save_pretrained(tmp_path / "full")
    loaded = Phi4FlashForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.bfloat16)
    kept = {name for name, p in loaded.named_parameters() if p.dtype == torch.float32}
    assert kept == {n for n, _ in loaded.named_parameters() if n.endswith("A_log") or "lambda_" in n}
    assert torch.equal(loaded.model.layers[0].attn.A_log, model.model.layers[0].attn.A_log)
    loaded.save_pretrained(tmp_path / "half")
    with safe_open(tmp_path / "half" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {n for n, _ in model.named_parameters()}  # the tied head is written once
        assert {n for n in file.keys() if file.get_tensor(n).dtype == torch.float32} == kept  # noqa: SIM118
    again = Phi4FlashForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32)
    ids = torch.randint(1, 96, (1, 30))
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_auto_classes_know_the_model(tmp_path):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    tiny_model().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), Phi4FlashConfig)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), Phi4FlashForCausalLM)
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "Phi4FlashModel"
