"""Which modules adapters go on: what is named is there, or told before weights are loaded; and each kind merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from train_toys import saved_weights, tiny_qwen, tiny_sambay, toy_recipe, train_toy

from sft.models.lora import attach_adapters, default_targets
from sft.models.lora_targets import check_adapters, check_targets
from sft.models.merge import final_tensors
from sft.utils.errors import UsageError

SETTINGS: dict[str, Any] = {
    "r": 2,
    "alpha": 4,
    "dropout": 0.0,
    "target_modules": None,
    "target_parameters": None,
    "modules_to_save": None,
    "use_rslora": False,
    "use_dora": False,
}


def untied() -> Any:
    return tiny_qwen(tie_word_embeddings=False)


def test_dora_leaves_out_the_projection_whose_bias_the_scan_adds() -> None:
    model = tiny_sambay()
    assert "dt_proj" in default_targets(model)
    assert "dt_proj" not in default_targets(model, dora=True)
    for targets in (["dt_proj", "fc1"], "all-linear"):
        with pytest.raises(UsageError, match="DoRA can't adapt dt_proj"):
            attach_adapters(tiny_sambay(), {**SETTINGS, "use_dora": True, "target_modules": targets}, seed=0)


@pytest.mark.parametrize("dora", [False, True])
def test_default_adapters_merge_into_what_they_computed(dora: bool) -> None:
    adapted = attach_adapters(tiny_sambay(), {**SETTINGS, "use_dora": dora}, seed=0).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        ids = torch.randint(3, 96, (1, 40))
        before = adapted(input_ids=ids, use_cache=False).logits
        after = adapted.merge_and_unload()(input_ids=ids, use_cache=False).logits
    assert (before - after).abs().max() < 1e-4 * before.abs().max()


HERE = "Wqkv, dt_proj, fc1, fc2, in_proj, out_proj, x_proj"


@pytest.mark.parametrize(
    ("make", "named", "sentence"),
    [
        (tiny_sambay, {"target_modules": ["q_proj", "k_proj", "Wqkv"]},
         f"train.lora_target_modules: no module is called 'q_proj'; these can take an adapter: {HERE}."),
        (tiny_sambay, {"target_modules": ["qkv"]}, "no module is called 'qkv'"),
        (tiny_sambay, {"target_modules": ["layers.9.mlp.fc1"]}, "no module is called 'layers.9.mlp.fc1'"),
        (tiny_sambay, {"target_modules": ["conv1d"]}, f"'conv1d' takes no adapter; these can take an adapter: {HERE}."),
        (tiny_sambay, {"target_modules": ["Wqkv", "lm_head"]}, "'lm_head' takes no adapter"),
        (tiny_sambay, {"target_modules": ["embed_tokens"]}, "'embed_tokens' takes no adapter"),
        (tiny_sambay, {"target_modules": ["attn"]}, "'attn' takes no adapter"),
        (tiny_sambay, {"target_modules": "Wqkv"},
         "matches the regular expression 'Wqkv'; as a module's name it stands in a list, [Wqkv]"),
        (tiny_sambay, {"target_modules": r".*\.nowhere"}, "no module's whole name matches"),
        (tiny_sambay, {"target_modules": ".*"}, "'.*' means model too, which takes no adapter"),
        (tiny_sambay, {"target_modules": "(fc1"}, "'(fc1' is no regular expression"),
        (tiny_sambay, {"target_modules": ["fc1"], "modules_to_save": ["fc1"]}, "'fc1' takes no adapter"),
        (tiny_sambay, {"modules_to_save": ["not_there"]}, "lora_modules_to_save: no module is called 'not_there'"),
        (tiny_sambay, {"modules_to_save": ["embed_tokens"]}, "embedding and output head are the same matrix"),
        (tiny_sambay, {"modules_to_save": ["lm_head"]}, "lm_head can't be changed alone"),
        (tiny_sambay, {"modules_to_save": ["attn"]}, "name modules that don't hold one another"),
        (tiny_sambay, {"target_parameters": ["experts.up"]}, "no parameter is called 'experts.up'; there are A_log, "),
        (tiny_qwen, {"target_modules": ["Wqkv", "fc1"]}, "no module is called 'Wqkv'"),
        (tiny_qwen, {"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens can't be changed alone"),
        (tiny_qwen, {"target_modules": ["lm_head"]}, "'lm_head' takes no adapter"),
        (untied, {"target_modules": ["lm_head", "q_proj"]}, "'lm_head' takes no adapter"),
        (untied, {"target_modules": r".*(q_proj|lm_head)"}, "means lm_head too, which takes no adapter"),
        (tiny_qwen, {"target_modules": ["mlp"]}, "'mlp' takes no adapter"),
        (untied, {"modules_to_save": ["score"]}, "no module is called 'score'"),
    ],
)  # fmt: skip
def test_what_is_named_is_there_or_told(make: Any, named: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_targets(make(), {**SETTINGS, **named})
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (tiny_sambay, {}),
        (tiny_sambay, {"target_modules": "all-linear"}),
        (tiny_sambay, {"target_modules": ["Wqkv", "layers.1.mlp.fc1"]}),
        (tiny_sambay, {"target_modules": r".*\.attn\.(Wqkv|in_proj)"}),
        (tiny_sambay, {"target_modules": ["Wqkv"], "modules_to_save": ["final_layernorm", "fc2"]}),
        (tiny_sambay, {"target_modules": ["Wqkv"], "target_parameters": ["A_log", "fc1.weight"]}),
        (tiny_qwen, {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["norm"]}),
        (untied, {"target_modules": ["embed_tokens", "q_proj"]}),
        (untied, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ],
)
def test_what_is_accepted_trains_is_handed_on_and_merges(make: Any, named: dict[str, Any], tmp_path: Path) -> None:
    """Every trained tensor moves; loaded again, and merged, they compute what the trained model did."""
    from peft import PeftModel

    model = make()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train = {"use_peft": True, "lora_r": 2, "lora_dropout": 0.0, "max_steps": 2, "learning_rate": 0.05}
    _, paths = train_toy(tmp_path, train | {f"lora_{key}": value for key, value in named.items()}, model=model)
    saved = saved_weights(paths.final_dir("one"))
    assert any("lora_B" in name for name in saved)
    assert [name for name, tensor in saved.items() if "lora_B" in name and not tensor.any()] == []
    ids = torch.randint(3, 96, (1, 30), generator=torch.Generator().manual_seed(0))

    def logits(of: Any) -> torch.Tensor:
        with torch.no_grad():
            return of.eval()(input_ids=ids, use_cache=False).logits

    wanted = logits(model)
    loaded = make()
    loaded.load_state_dict(start)
    plain = logits(loaded)
    adapted = PeftModel.from_pretrained(loaded, str(paths.final_dir("one")))
    assert (wanted - plain).abs().max() > 1e-3
    torch.testing.assert_close(logits(adapted), wanted, rtol=0, atol=1e-5)
    merged = make()
    merged.load_state_dict({name: tensor.read() for name, tensor in final_tensors(adapted).items()}, strict=False)
    merged.tie_weights()
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("folder", [False, True], ids=["config", "checkpoint"])
def test_adapters_are_checked_before_weights_are_loaded(folder: bool, tmp_path: Path) -> None:
    """From the configuration alone: the checkpoint's folder has no weights yet."""
    tiny_sambay().config.save_pretrained(tmp_path / "start")
    section = {"model_name_or_path": str(tmp_path / "start")}
    if not folder:
        section = {
            "config": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
            "tokenizer": "tiny",
        }
    trains = [{}, {"use_peft": True}, {"use_peft": True, "lora_target_modules": ["q_proj"]}]
    with pytest.raises(UsageError, match=r"^stages\[three\]\.train\.lora_target_modules: no module is called 'q_proj'"):
        check_adapters(toy_recipe(tmp_path, *trains, model=section))
    check_adapters(toy_recipe(tmp_path, *trains[:2], model=section))
